"""Drawings of a pipeline or a lineage: text for a terminal, Mermaid source, SVG for a file or a page.

Every name is escaped; the same graph gives the same bytes; a mark, a border and a word show a status, so that colour
only repeats it. The wide form has layers from top to bottom (layers.py), the narrow form is a list with lanes at its
side (lanes.py). Many parallel copies share one frame, and their edges are drawn once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma2.core.outputs.safetensors_header import printable
from gemma2.posttrain.reports.plots.values import clipped, columns_of

from .drawing import drawing
from .graph import Edge, Node, graph_of
from .lanes import graph_rows

__all__ = ["Edge", "Node", "dag_mermaid", "dag_svg", "dag_text"]

LANES_SHARE = 0.4  # of the width of a terminal; wider lanes are replaced by the names of the nodes used
MERMAID_STYLES = {
    "running": "stroke-width:3px",
    "failed": "stroke:#d55e00,stroke-width:3px",
    "interrupted": "stroke:#8a6d00,stroke-width:3px,stroke-dasharray:6 3",
    "blocked": "stroke-dasharray:3 3",
    "waiting": "stroke-dasharray:3 3",
    "not needed": "stroke-dasharray:1 4",
}


def dag_text(nodes: Sequence[Node], edges: Sequence[Edge], width: int = 80) -> str:
    """One line per node in topological order, at most `width` characters: lanes, name, detail, status.

    If the lanes would take too much of the width, each node is followed by the names of the nodes that it uses.
    """
    graph = graph_of(nodes, edges)
    lanes = graph_rows(graph)
    room = max(map(len, lanes), default=0)
    if room > LANES_SHARE * width:
        return as_table(list(graph.nodes.values()), graph.above(), width)
    rows = [(node.label, node.detail, node.status) for node in graph.nodes.values()]
    columns = fitted(rows, width - room - 2)
    lines = [f"{lane:<{room}}  {line}" for lane, line in zip(lanes, columns, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def as_table(nodes: Sequence[Node], above: dict[str, list[str]], width: int) -> str:
    """A line per node, with the names of the nodes that it uses indented below it."""
    named = {node.id: printable(node.label) for node in nodes}
    lines = []
    heads = fitted([(node.label, node.detail, node.status) for node in nodes], width)
    for node, head in zip(nodes, heads, strict=True):
        lines.append(head.rstrip())
        line = "   "
        for i, name in enumerate(above[node.id]):
            word = clipped(f"{'← ' if i == 0 else ''}{named[name]}", width - 5)
            if len(line) + 1 + len(word) > width:
                lines.append(line)
                line = "     "
            line += f" {word}"
        lines += [line] if above[node.id] else []
    return "\n".join(lines)


def fitted(rows: Sequence[tuple[str, str, str]], width: int) -> list[str]:
    """Rows with their cells in columns, at most `width` characters; details are clipped first, names last."""
    clean = [[printable(cell) for cell in row] for row in rows]
    sizes = [max((columns_of(row[i]) for row in clean), default=0) for i in range(3)]
    for i in (1, 2, 0):
        excess = sum(sizes) + 2 * sum(size > 0 for size in sizes[1:]) - width
        sizes[i] -= min(max(excess, 0), max(sizes[i] - 8, 0))
    return ["  ".join(filled(cell, size) for cell, size in zip(row, sizes, strict=True) if size) for row in clean]


def filled(text: str, size: int) -> str:
    """The text clipped or padded to `size` columns of a terminal."""
    text = clipped(text, size)
    return text + " " * (size - columns_of(text))


def dag_mermaid(nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """Mermaid source of a flowchart from top to bottom; incomplete nodes have a border by status, and name it."""
    graph = graph_of(nodes, edges)
    short = {name: f"n{i}" for i, name in enumerate(graph.nodes)}
    lines = ["flowchart TD"]
    for name, node in graph.nodes.items():
        text = mermaid_text(node.label) + (f"<br/>{mermaid_text(node.second)}" if node.second else "")
        lines.append(f'    {short[name]}["{text}"]')
    for (source, target), roles in graph.roles.items():
        role = mermaid_text(", ".join(role for role in roles if role))
        lines.append(f"    {short[source]} -->" + (f'|"{role}"| ' if role else " ") + short[target])
    for status, style in MERMAID_STYLES.items():
        members = [short[name] for name, node in graph.nodes.items() if node.status == status]
        kind = status.replace(" ", "-")
        lines += [f"    classDef {kind} {style}", f"    class {','.join(members)} {kind}"] if members else []
    return "\n".join(lines) + "\n"


def mermaid_text(text: str) -> str:
    """The text with all but letters, digits and harmless signs as #code; entities of Mermaid."""
    return re.sub(r"[^\w\s.,:/+=·…-]", lambda found: f"#{ord(found[0])};", printable(text))


def dag_svg(nodes: Sequence[Node], edges: Sequence[Edge], *, narrow: bool = False, page: str | None = None) -> str:
    """The graph as SVG: a file, or with `page` (a prefix of ids) an element of a page.

    narrow: one box per row and lanes at the side, readable at 360 px. Tool tips have full names, roles and tips.
    """
    return drawing(graph_of(nodes, edges), narrow, page)
