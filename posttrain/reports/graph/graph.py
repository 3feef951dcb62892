"""A directed acyclic graph to draw: topological order, neighbours, and parallel copies that share one frame. Pure.

A cycle is an error of the caller; it is drawn all the same, with the edge that closes it pointing upwards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Edge", "Graph", "Node", "graph_of"]

Pair = tuple[str, str]


@dataclass(frozen=True)
class Node:
    """A box. `detail` is its second line, `tip` is added to its tool tip, `href` is the target of a click."""

    id: str
    label: str
    detail: str = ""
    status: str = ""
    tip: str = ""
    href: str = ""

    @property
    def shown_status(self) -> str:
        """The status, or "" for complete."""
        return "" if self.status == "complete" else self.status

    @property
    def second(self) -> str:
        """The second line: the detail, and the status unless it is complete."""
        return " · ".join(text for text in (self.detail, self.shown_status) if text)


@dataclass(frozen=True)
class Edge:
    """An edge from a node to a node that uses it, by id."""

    source: str
    target: str
    role: str = ""


@dataclass(frozen=True)
class Graph:
    """`nodes` in topological order; `roles` by (source, target); `down` holds the same pairs, upper node first."""

    nodes: Mapping[str, Node]
    roles: Mapping[Pair, Sequence[str]]
    down: Sequence[Pair]

    def above(self) -> dict[str, list[str]]:
        """Node -> the nodes that it uses, in the order of `nodes`."""
        return self._neighbours((lower, upper) for upper, lower in self.down)

    def below(self) -> dict[str, list[str]]:
        """Node -> the nodes that use it, in the order of `nodes`."""
        return self._neighbours(self.down)

    def _neighbours(self, pairs: Iterable[Pair]) -> dict[str, list[str]]:
        place = {name: i for i, name in enumerate(self.nodes)}
        found: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, other in pairs:
            found[name].append(other)
        return {name: sorted(others, key=place.__getitem__) for name, others in found.items()}

    def copies(self, least: int) -> list[list[str]]:
        """The nodes in entries of one, in topological order; `least` or more parallel copies share an entry.

        Parallel copies use the same nodes and are used by the same nodes.
        """
        above, below = self.above(), self.below()
        alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for name in self.nodes:
            alike.setdefault((tuple(above[name]), tuple(below[name])), []).append(name)
        entries: dict[str, list[str]] = {}
        for names in alike.values():
            for group in [names] if len(names) >= least else [[name] for name in names]:
                entries |= dict.fromkeys(group, group)
        return [entries[name] for name in self.nodes if entries[name][0] == name]

    def title(self, pair: Pair) -> str:
        """An edge as text: `sft → policy-1 (policy)`."""
        names = " → ".join(self.nodes[name].label for name in pair)
        roles = ", ".join(role for role in self.roles[pair] if role)
        return f"{names} ({roles})" if roles else names


def graph_of(nodes: Sequence[Node], edges: Sequence[Edge]) -> Graph:
    """Order the nodes, join edges between the same two nodes, and drop edges from a node to itself.

    Raises ValueError for two nodes with one id and for an edge from or to an unknown node.
    """
    known = {node.id: node for node in nodes}
    if len(known) < len(nodes):
        raise ValueError("two nodes have the same id")
    roles: dict[Pair, list[str]] = {}
    for edge in edges:
        if not {edge.source, edge.target} <= known.keys():
            raise ValueError(f"the edge {edge.source} -> {edge.target} leads to no node")
        if edge.source != edge.target:
            found = roles.setdefault((edge.source, edge.target), [])
            found += [edge.role] if edge.role not in found else []
    place = {name: i for i, name in enumerate(topological(list(known), roles))}
    down = dict.fromkeys((a, b) if place[a] < place[b] else (b, a) for a, b in roles)
    return Graph({name: known[name] for name in place}, roles, list(down))


def topological(names: Sequence[str], edges: Iterable[Pair]) -> list[str]:
    """The names, ordered so that every edge leads forward and otherwise as given; a cycle starts at its first name."""
    given = {name: i for i, name in enumerate(names)}
    below: dict[str, list[str]] = {name: [] for name in names}
    missing = dict.fromkeys(names, 0)
    for source, target in edges:
        below[source].append(target)
        missing[target] += 1
    ready = [given[name] for name in names if not missing[name]]
    waiting = iter(names)
    order: dict[str, None] = {}
    while len(order) < len(names):
        if not ready:
            ready = [given[next(name for name in waiting if name not in order)]]
        name = names[heapq.heappop(ready)]
        if name in order:
            continue
        order[name] = None
        for target in below[name]:
            missing[target] -= 1
            if not missing[target] and target not in order:
                heapq.heappush(ready, given[target])
    return list(order)
