"""Positions of the boxes of a graph, in layers from top to bottom (Sugiyama's method). Pure.

    layer      longest path from a source; a source is placed just above its first user; a layer too wide for a page
               is split into several
    order      barycentres, in a few sweeps down and up; the order with the fewest crossings is kept
    x          each box moves to the mean of its neighbours; isotonic regression (pool adjacent violators) keeps boxes
               apart

Deviation: the edges from one source over several layers share one chain of waypoints, so that the edges of a model that
many others use form one trunk with branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

__all__ = ["Layout", "layered"]

Pair = tuple[int, int]
Size = tuple[float, float]  # width, height
GAP, LANE, BETWEEN = 22.0, 16.0, 38.0  # between boxes, between waypoints, between layers
WIDEST = 1150.0  # width of the boxes of one layer
SWEEPS = 12
LEAN = 0.8  # factor by which a sweep reduces the distance of a box from the axis


@dataclass(frozen=True)
class Layout:
    """`boxes`: (left, top, width, height) of every item. `routes`: points (x, y) of an edge from top to bottom; it may
    bend between two layers and runs straight down through a layer (every second piece)."""

    boxes: Sequence[tuple[float, float, float, float]]
    routes: Mapping[Pair, Sequence[tuple[float, float]]]
    width: float
    height: float


class Layers:
    """Items (numbered from 0, in topological order) and waypoints (numbered after the items) in layers."""

    def __init__(self, sizes: Sequence[Size], links: Sequence[Pair]) -> None:
        self.sizes = list(sizes)
        self.up: dict[int, list[int]] = {}
        self.down: dict[int, list[int]] = {}
        self.rank = broken(ranks(len(sizes), links), sizes)
        self.chains: dict[tuple[int, int], int] = {}  # (source, rank) -> waypoint
        self.rows: list[list[int]] = [[] for _ in range(max(self.rank, default=-1) + 1)]
        for item, rank in enumerate(self.rank):
            self.rows[rank].append(item)
        for link in links:
            self.route(link)

    def route(self, link: Pair) -> None:
        """Lead a link through a waypoint in every layer between its ends."""
        source, target = link
        for a, b in pairwise([source, *self.passed(link), target]):
            if b not in self.down.setdefault(a, []):
                self.down[a].append(b)
                self.up.setdefault(b, []).append(a)

    def passed(self, link: Pair) -> list[int]:
        """The waypoints of a link; missing ones are created."""
        source, target = link
        found = []
        for rank in range(self.rank[source] + 1, self.rank[target]):
            if (source, rank) not in self.chains:
                self.chains[source, rank] = len(self.sizes)
                self.rows[rank].append(len(self.sizes))
                self.sizes.append((0.0, 0.0))
            found.append(self.chains[source, rank])
        return found

    def is_waypoint(self, item: int) -> bool:
        return self.sizes[item] == (0.0, 0.0)

    # --- order ---

    def untangle(self) -> None:
        """Order every layer by barycentres, keeping the best of several sweeps."""
        best, fewest = [list(row) for row in self.rows], self.crossings()
        for sweep in range(SWEEPS):
            downwards = sweep % 2 == 0
            for row in self.rows if downwards else reversed(self.rows):
                self.sort(row, self.up if downwards else self.down)
            crossings = self.crossings()
            if crossings < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def sort(self, row: list[int], neighbours: Mapping[int, Sequence[int]]) -> None:
        """Sort a layer by the mean position of each item's neighbours; items without neighbours keep their position."""
        share = {item: (i + 0.5) / len(row) for row in self.rows for i, item in enumerate(row)}
        row.sort(key=lambda item: fmean(share[n] for n in neighbours.get(item) or [item]))

    def crossings(self) -> int:
        """Pairs of links between neighbouring layers that cross."""
        place = {item: i for row in self.rows for i, item in enumerate(row)}
        total = 0
        for row in self.rows[:-1]:
            lines = [(place[a], place[b]) for a in row for b in self.down.get(a, ())]
            total += sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(lines) for c, d in lines[:i])
        return total

    # --- places ---

    def columns(self) -> dict[int, float]:
        """x of the centre of every item and waypoint; the leftmost border is at 0."""
        x = {}
        for row in self.rows:
            for item, place in zip(row, apart([0.0] * len(row), self.distances(row), [1.0] * len(row)), strict=True):
                x[item] = place
        for sweep in range(2 * SWEEPS):
            downwards = sweep % 2 == 0
            for row in self.rows if downwards else reversed(self.rows):
                self.pull(row, x, self.up if downwards else self.down)
        left = min((x[item] - self.sizes[item][0] / 2 for item in x), default=0.0)
        return {item: place - left for item, place in x.items()}

    def pull(self, row: Sequence[int], x: dict[int, float], neighbours: Mapping[int, Sequence[int]]) -> None:
        """Move a layer as close to its neighbours as its boxes allow; waypoints weigh more, so trunks stay straight.

        Boxes are pulled towards the axis (0); otherwise a drawing whose layers all lean one way would drift off.
        """
        wanted, weights = [], []
        for item in row:
            mean = fmean(x[n] for n in neighbours.get(item) or [item])
            trunk = self.is_waypoint(item)
            wanted.append(mean if trunk else mean * LEAN)
            weights.append(4.0 if trunk else 1.0 if neighbours.get(item) else 0.1)
        x |= dict(zip(row, apart(wanted, self.distances(row), weights), strict=True))

    def distances(self, row: Sequence[int]) -> list[float]:
        """Least distances between the centres of adjacent items of a layer."""
        gaps = [LANE if self.is_waypoint(a) and self.is_waypoint(b) else GAP for a, b in pairwise(row)]
        return [
            (self.sizes[a][0] + self.sizes[b][0]) / 2 + gap for (a, b), gap in zip(pairwise(row), gaps, strict=True)
        ]


def ranks(count: int, links: Sequence[Pair]) -> list[int]:
    """The layer of every item: its longest path from a source; a source is just above its highest user.

    links: (upper, lower) of items in topological order.
    """
    rank = [0] * count
    for upper, lower in sorted(links, key=lambda link: link[1]):
        rank[lower] = max(rank[lower], rank[upper] + 1)
    used = {lower for _, lower in links}
    below: dict[int, list[int]] = {}
    for upper, lower in links:
        below.setdefault(upper, []).append(rank[lower])
    return [rank[i] if i in used else min(below.get(i, [1])) - 1 for i in range(count)]


def broken(rank: Sequence[int], sizes: Sequence[Size]) -> list[int]:
    """The layer of every item after splitting layers wider than WIDEST, in the order of the items."""
    found, start = [0] * len(rank), 0
    for layer in sorted(set(rank)):
        used = 0.0
        for item in (i for i, own in enumerate(rank) if own == layer):
            width = sizes[item][0] + GAP
            if used and used + width > WIDEST:
                start, used = start + 1, 0.0
            used += width
            found[item] = start
        start += 1
    return found


def apart(wanted: Sequence[float], distances: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Increasing positions at least `distances` apart, with the least weighted squared distance to `wanted`.

    Positions minus the sum of the distances before them must not decrease, which is isotonic regression.
    """
    before = [0.0]
    for distance in distances:
        before.append(before[-1] + distance)
    blocks: list[list[float]] = []  # [sum of weight * value, weight, members]
    for want, offset, weight in zip(wanted, before, weights, strict=False):
        blocks.append([weight * (want - offset), weight, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    levels = [block[0] / block[1] for block in blocks for _ in range(int(block[2]))]
    return [level + offset for level, offset in zip(levels, before, strict=False)]


def layered(sizes: Sequence[Size], links: Sequence[Pair]) -> Layout:
    """The layout of items of these sizes, numbered in topological order; links are (upper, lower)."""
    layers = Layers(sizes, links)
    layers.untangle()
    x = layers.columns()
    tops, y = [], 0.0
    for row in layers.rows:
        tops.append(y)
        y += max(layers.sizes[item][1] for item in row) + BETWEEN
    ends = [top - BETWEEN for top in [*tops[1:], y]]
    boxes = [
        (round(x[i] - w / 2, 1), round(tops[layers.rank[i]], 1), w, h) for i, (w, h) in enumerate(sizes)
    ]  # fmt: skip
    routes = {}
    for link in links:
        source, target = link
        first = layers.rank[source]
        path = [(x[source], boxes[source][1] + sizes[source][1]), (x[source], ends[first])]
        for i, waypoint in enumerate(layers.passed(link), first + 1):
            path += [(x[waypoint], tops[i]), (x[waypoint], ends[i])]
        routes[link] = [(round(a, 1), round(b, 1)) for a, b in [*path, (x[target], boxes[target][1])]]
    right = max((place + layers.sizes[item][0] / 2 for item, place in x.items()), default=0.0)
    return Layout(boxes, routes, round(right, 1), max(y - BETWEEN, 0.0))
