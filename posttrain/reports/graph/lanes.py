"""A graph as rows with lanes at their side, as in the log of a version control system. Pure.

There is one row per item, in topological order. The lane of an item runs down to the row of its last user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count

from .graph import Graph

__all__ = ["graph_rows", "lanes_of"]

MARKS = {"complete": "●", "": "●", "running": "◐", "failed": "✗", "interrupted": "◑"}


def lanes_of(last: Sequence[int]) -> list[int | None]:
    """The lane of every row, 0 nearest to the rows, short lanes inside and long ones outside; None without users.

    last: row -> row of the last user, or the row itself without users.
    """
    lanes: list[int | None] = [None] * len(last)
    taken: list[list[tuple[int, int]]] = []
    for row in sorted(range(len(last)), key=lambda row: (last[row] - row, row)):
        if last[row] == row:
            continue
        lane = next(i for i in count() if i >= len(taken) or free(taken[i], row, last[row]))
        taken += [[]] if lane == len(taken) else []
        taken[lane].append((row, last[row]))
        lanes[row] = lane
    return lanes


def free(spans: Iterable[tuple[int, int]], start: int, end: int) -> bool:
    """Whether a lane is free between two rows; a span may begin at the row where another ends."""
    return all(end <= a or b <= start for a, b in spans)


def graph_rows(graph: Graph) -> list[str]:
    """The lanes of each node's row in characters, in the order of the nodes; a mark stands for the node.

    A line into a mark from above or from the side comes from a node that it uses.
    """
    names = list(graph.nodes)
    place = {name: i for i, name in enumerate(names)}
    above = {place[name]: [place[other] for other in others] for name, others in graph.above().items()}
    last = {place[name]: max((place[other] for other in others), default=-1) for name, others in graph.below().items()}
    lane: dict[int, int] = {}  # row -> its lane, until its last user
    blocked: set[int] = set()  # lanes that end in the row above; a mark right below would look connected to them
    lines = []
    for row, name in enumerate(names):
        ending = [parent for parent in above[row] if last[parent] == row]
        own = min((lane[parent] for parent in ending), default=-1)
        if own < 0:
            own = next(i for i in count() if i not in blocked and i not in lane.values())
        joined = {lane[parent]: parent not in ending for parent in above[row] if lane[parent] != own}
        lines.append(drawn(own, MARKS.get(graph.nodes[name].status, "○"), joined, set(lane.values())))
        for parent in ending:
            del lane[parent]
        blocked = set()
        if last[row] > row:
            lane[row] = own
        else:
            blocked = {own}
    return lines


def drawn(own: int, mark: str, joined: Mapping[int, bool], running: set[int]) -> str:
    """The characters of one row. joined: lane of a node used here -> whether the lane continues below."""
    span = [own, *joined]
    low, high = min(span), max(span)
    cells = []
    for lane in range(max([*span, *running]) + 1):
        inside = low <= lane <= high
        if lane == own:
            cell = mark
        elif lane in joined:
            shapes = "├╰" if lane == low else "┤╯" if lane == high else "┼┴"
            cell = shapes[0 if joined[lane] else 1]
        else:
            cell = "│" if lane in running else "─" if inside else " "
        cells.append(cell + ("─" if low <= lane < high else " "))
    return "".join(cells).rstrip()
