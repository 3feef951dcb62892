"""Places for the labels of a picture: next to their points, overlapping no other label, point, line or bar.

Greedy: the most important label first, each at the nearest free place on circles around its point. An important label
(`must`) without a free place takes the one that covers the fewest marks; it never covers another label, and is left out
only where every place would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from gemma2.core.json_files import JsonMapping

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FAINT", "Box", "Label", "WantedLabel", "label_points", "overlap", "place_labels"]

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
RADII = (9, 14, 20, 28, 38, 50, 64, 80, 100)
ANGLES = (45, 135, 90, 0, -45, 180, -90, -135, 22, 158, 68, 112, -22, -158, -68, -112)


FAR = 22  # points; a label that is farther from its point has a line to it
FAINT = 0.18  # opacity of lines that a label may cover


@dataclass(frozen=True)
class Label:
    """The label of a point of the front. rank: 0 is the most important; from 2 on it is left out without room."""

    point: JsonMapping
    text: str
    rank: int
    colour: str


@dataclass(frozen=True)
class WantedLabel:
    """A label: its point, its size, and whether it must be shown."""

    x: float
    y: float
    width: float
    height: float
    must: bool = True


def place_labels(
    labels: Sequence[WantedLabel], marks: Sequence[Box], frame: Box, unit: float = 1.0
) -> list[Box | None]:
    """The box of each label, in the order of their importance; None for one that is left out.

    marks: boxes of what is drawn. unit: pixels of a step of RADII.
    """
    placed: list[Box | None] = []
    for label in labels:
        others = [box for box in placed if box is not None]
        best: tuple[int, Box] | None = None
        for box in _places(label, unit):
            inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
            if not inside or any(overlap(box, other) for other in others):
                continue
            covered = sum(overlap(box, mark) for mark in marks)
            if best is None or covered < best[0]:
                best = covered, box
            if covered == 0:
                break
        placed.append(best[1] if best is not None and (best[0] == 0 or label.must) else None)
    return placed


def _places(label: WantedLabel, unit: float) -> Iterator[Box]:
    """Boxes around the point, nearest first; the side or corner that faces the point is on the circle."""
    for radius in RADII:
        for degrees in ANGLES:
            dx, dy = (radius * unit * f(math.radians(degrees)) for f in (math.cos, math.sin))
            left = label.x + dx - (label.width / 2 if abs(dx) < unit else 0 if dx > 0 else label.width)
            low = label.y + dy - (label.height / 2 if abs(dy) < unit else 0 if dy > 0 else label.height)
            yield left, low, left + label.width, low + label.height


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def label_points(figure: Figure, axis: Axes, points: Sequence[JsonMapping], labels: Sequence[Label]) -> None:
    """Write each label where it overlaps no point and no other label; those of rank 2 only where there is room.

    A label that is far from its point gets a thin line to it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout that the labels are placed in is kept, and not computed again
    assert isinstance(figure.canvas, FigureCanvasAgg)  # as new_figure makes it
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    drawn = [
        axis.text(0, 0, label.text, transform=None, color=label.colour, fontsize=9 if label.rank < 2 else 8,
                  fontweight="bold" if label.rank < 2 else "normal", zorder=5)
        for label in labels
    ]  # fmt: skip
    wanted = []
    for label, text in zip(labels, drawn, strict=True):
        x, y = axis.transData.transform((label.point["kl"], label.point["reward"]))
        box = text.get_window_extent(renderer)
        wanted.append(WantedLabel(x, y, box.width + 3 * scale, box.height + scale, label.rank < 2))
    marks: list[Box] = []
    for point in points:
        x, y = axis.transData.transform((point["kl"], point["reward"]))
        marks.append((x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale))
    marks += [(x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale) for x, y in along_lines(axis)]
    frame = axis.get_window_extent(renderer)
    places = place_labels(wanted, marks, (frame.x0, frame.y0, frame.x1, frame.y1), scale)
    to_axes = axis.transAxes.inverted()
    for text, want, place in zip(drawn, wanted, places, strict=True):
        if place is None:
            text.remove()
            continue
        middle = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
        text.set(transform=axis.transAxes, position=to_axes.transform(middle), ha="center", va="center")
        nearest = min(max(want.x, place[0]), place[2]), min(max(want.y, place[1]), place[3])
        if math.dist(nearest, (want.x, want.y)) > FAR * scale:
            ends = [to_axes.transform(end) for end in ((want.x, want.y), nearest)]
            axis.plot(
                *zip(*ends, strict=True), color=text.get_color(), lw=0.7, alpha=0.7, transform=axis.transAxes, zorder=2
            )


def along_lines(axis: Axes) -> list[tuple[float, float]]:
    """Positions every few dots along lines and error bars, in display coordinates, which labels must not cover."""
    from matplotlib.collections import LineCollection

    places: list[tuple[float, float]] = []
    drawn = [line.get_xydata() for line in axis.get_lines() if (line.get_alpha() or 1.0) > FAINT]
    bars = [each for each in axis.collections if isinstance(each, LineCollection)]
    drawn += [segment for each in bars for segment in each.get_segments()]
    for path in drawn:
        corners = axis.transData.transform(path)
        for (x0, y0), (x1, y1) in pairwise(corners):
            steps = max(1, int(math.hypot(x1 - x0, y1 - y0) // 6))
            places += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps)]
    return places
