"""A lineage as a tree in characters, from the roots to the result. Pure.

Every origin has one line, below the parent that it continues (a policy below its init, a merge below its base). Its
other parents follow by name, with `above` or `below` for their place in the tree.
"""

from __future__ import annotations

import textwrap

from gemma2.core.outputs.safetensors_header import printable

from .graph.render import dag_mermaid, dag_svg
from .lineage import Lineage, Origin
from .plots.values import clipped, columns_of, short_hash

__all__ = ["lineage_text", "rendered"]

# Roles of the parent that a result continues, in order of preference.
CONTINUES = ("base", "init", "policy", "model", "student", "sft", "teacher")
LONGEST = 46  # columns; hashes and commands after longer names are not aligned


def rendered(lineage: Lineage, form: str, width: int = 80) -> str:
    """The lineage as "text" (the tree), "mermaid" or "svg"."""
    draw = {"mermaid": dag_mermaid, "svg": dag_svg}.get(form)
    return draw(*lineage.drawn()) if draw else lineage_text(lineage, width) + "\n"


def lineage_text(lineage: Lineage, width: int = 80) -> str:
    """The tree, a line per origin: role, name, digits of its hash, command, problem."""
    return "\n".join(Tree(lineage, width).lines())


class Tree:
    """The parent below which each origin is drawn, and the order of the lines."""

    def __init__(self, lineage: Lineage, width: int) -> None:
        self.width = width
        self.origins = {origin.id: origin for origin in lineage.origins}
        self.parents: dict[str, list[tuple[str, str]]] = {name: [] for name in self.origins}
        for source, target, role in lineage.uses:
            if source != target:
                self.parents[target].append((source, role))
        place = {name: i for i, name in enumerate(self.origins)}  # a parent in a cycle may come later; it is left out
        earlier = {n: [use for use in found if place[use[0]] < place[n]] for n, found in self.parents.items()}
        self.main = {name: min(found, key=rank) if found else None for name, found in earlier.items()}
        self.children: dict[str | None, list[str]] = {}
        for name, main in self.main.items():
            self.children.setdefault(main[0] if main else None, []).append(name)
        trunk = self.trunk(lineage.result)
        # Origins without children come first and the result last, so that most parents are above the lines naming them.
        self.children[None] = sorted(self.children.get(None, []), key=lambda n: (n in trunk, n in self.children))
        self.rows = list(self.walk())
        self.position = {name: i for i, (name, _, _) in enumerate(self.rows)}

    def trunk(self, name: str | None) -> set[str]:
        """The result and the origins that it continues; their tree comes last, below the origins that it uses."""
        found = set[str]()
        while name is not None:
            found.add(name)
            main = self.main[name]
            name = main[0] if main else None
        return found

    def walk(self) -> list[tuple[str, str, str]]:
        """(name, prefix of its line, prefix of the lines below it), depth first."""
        rows = []
        waiting = [(name, "", "") for name in reversed(self.children[None])]
        while waiting:
            name, head, rest = waiting.pop()
            rows.append((name, head, rest))
            children = self.children.get(name, [])
            for i, child in reversed(list(enumerate(children))):
                last = i == len(children) - 1
                waiting.append((child, f"{rest}{'└─' if last else '├─'} ", f"{rest}{'  ' if last else '│ '} "))
        return rows

    def indented(self, before: str) -> str:
        """The prefix of a line, cut on the left if the tree is too deep for the width."""
        most = self.width // 2
        return before if len(before) <= most else f"…{before[1 - most :]}"

    def lines(self) -> list[str]:
        """The lines of the text."""
        heads = [f"{self.indented(head)}{self.title(name)}" for name, head, _ in self.rows]
        column = min(max(map(columns_of, heads), default=0), LONGEST)
        lines = []
        for (name, _, rest), head in zip(self.rows, heads, strict=True):
            origin = self.origins[name]
            line = f"{head}{' ' * (column - columns_of(head))}  {short_hash(origin.digest) or '-':<10}  {facts(origin)}"
            lines.append(clipped(line.rstrip(), self.width))
            below = "│  " if self.children.get(name) else "   "
            lines += self.others(name, self.indented(rest + below))
        return lines

    def title(self, name: str) -> str:
        main = self.main[name]
        return f"{main[1]} → {self.called(name)}" if main else self.called(name)

    def called(self, name: str) -> str:
        return printable(self.origins[name].name)

    def others(self, name: str, before: str) -> list[str]:
        """Lines with the other parents of an origin, as `role: names (above)` for each role."""
        roles: dict[str, list[str]] = {}
        for source, role in self.parents[name]:
            if (source, role) != self.main[name]:
                roles.setdefault(source, []).append(role)
        groups: dict[str, list[str]] = {}
        for source, found in roles.items():
            groups.setdefault(", ".join(found), []).append(source)
        parts = []
        for role, sources in groups.items():
            above = [self.position[source] < self.position[name] for source in sources]
            places = ["above" if flag else "below" for flag in above]
            names = [self.called(source) for source in sources]
            if len(set(places)) > 1:
                names = [f"{source} ({place})" for source, place in zip(names, places, strict=True)]
            parts.append(f"{printable(role)}: {', '.join(names)}" + ("" if len(set(places)) > 1 else f" ({places[0]})"))
        room = max(self.width - columns_of(before), 20)
        return [before + line for line in textwrap.wrap("; ".join(parts), room, break_on_hyphens=False)]


def rank(use: tuple[str, str]) -> int:
    """The index of a parent's role in CONTINUES."""
    return CONTINUES.index(use[1]) if use[1] in CONTINUES else len(CONTINUES)


def facts(origin: Origin) -> str:
    """The command that made an origin, or its kind if none did, and its problem."""
    kinds = {"hub": "from the hub", "file": "file", "model": "not made by gemma2", "output": ""}
    what = printable(origin.command) or ("" if origin.note else kinds.get(origin.kind, ""))
    return ", ".join(text for text in (what, origin.note) if text)
