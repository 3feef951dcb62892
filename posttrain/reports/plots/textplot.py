"""The KL-reward front in plain characters, for a terminal: braille dots for lines, one glyph per policy. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from textwrap import wrap

from gemma2.core.json_files import JsonMapping

from .point_kinds import glyph_of, is_merge, line_word, word_of
from .values import end_of, fixed, label_of, start_of, title_of

__all__ = ["front_text", "line_labels", "off_chart"]

Point = JsonMapping

# Bit of each dot of a braille cell, by (row, column): U+2800 + bits.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def is_barred(point: Point) -> bool:
    """Whether the interval of a point is drawn: of base, SFT and merges; those of the others would cover each other."""
    return point["kind"] in ("base", "sft") or is_merge(point["kind"])


def ends_of(point: Point) -> tuple[float | None, float | None]:
    """The ends of the 95 % interval of a reward; None if unknown."""
    return point.get("reward_low"), point.get("reward_high")


class Canvas:
    """A grid of characters over braille dots, with a scale. Cell (0, 0) is at the lower left."""

    def __init__(self, width: int, height: int, points: Sequence[Point]) -> None:
        self.width, self.height = width, height
        self.x = padded([point["kl"] for point in points])
        bars = [end for point in points if is_barred(point) for end in ends_of(point) if end is not None]
        self.y = padded([*(point["reward"] for point in points), *bars])
        self.dots = [[0] * width for _ in range(height)]
        self.glyphs: dict[tuple[int, int], str] = {}

    def place(self, point: Point) -> tuple[float, float]:
        """Column and row of a point, in cells."""
        across = (point["kl"] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point["reward"] - self.y[0]) / (self.y[1] - self.y[0])
        return across * (self.width - 1), up * (self.height - 1)

    def line(self, start: Point, end: Point) -> None:
        """Draw braille dots from one point to another: 2 per cell across, 4 up."""
        (x0, y0), (x1, y1) = self.place(start), self.place(end)
        steps = max(1, math.ceil(max(abs(x1 - x0) * 2, abs(y1 - y0) * 4)))
        for i in range(steps + 1):
            column = round((x0 + (x1 - x0) * i / steps) * 2)
            row = round((y0 + (y1 - y0) * i / steps) * 4)
            self.dots[row // 4 % self.height][column // 2] |= DOTS[3 - row % 4][column % 2]

    def bar(self, point: Point) -> None:
        """Draw the 95 % interval of a point's reward, if it is known, upright through the point."""
        if is_barred(point) and None not in ends_of(point):
            low, high = ends_of(point)
            self.line({**point, "reward": low}, {**point, "reward": high})

    def mark(self, point: Point) -> None:
        """Draw the glyph of a policy, over any earlier glyph in its cell."""
        column, row = self.place(point)
        self.glyphs[round(column), round(row)] = glyph_of(point["kind"])

    def write(self, point: Point, text: str, over_lines: bool = False) -> None:
        """Write a label next to a point, or a row above or below; leave it out if all these places are taken."""
        column, row = (round(value) for value in self.place(point))
        left, right = column - 1 - len(text), column + 2
        for start, up in ((left, 0), (right, 0), (left + 1, 1), (right - 1, -1), (left + 1, -1), (right - 1, 1)):
            cells = [(start + i, row + up) for i in range(len(text))]
            if self.free([(start - 1, row + up), *cells, (start + len(text), row + up)], over_lines):
                self.glyphs |= dict(zip(cells, text, strict=True))
                return

    def free(self, cells: Sequence[tuple[int, int]], over_lines: bool) -> bool:
        """Whether all cells are empty and on the canvas; the first and the last may be outside."""
        inside = all(0 <= column < self.width and 0 <= row < self.height for column, row in cells[1:-1])
        return inside and not any(
            cell in self.glyphs or (not over_lines and self.dots[cell[1]][min(max(cell[0], 0), self.width - 1)])
            for cell in cells
        )

    def row(self, index: int) -> str:
        """The characters of one row."""
        cells = (
            self.glyphs.get((column, index)) or (chr(0x2800 + bits) if bits else " ")
            for column, bits in enumerate(self.dots[index])
        )
        return "".join(cells).rstrip()


def padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, widened if they are all equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def off_chart(points: Sequence[Point]) -> list[Point]:
    """Base models so far away that all other points would share less than half of an axis."""
    rest = [point for point in points if point["kind"] != "base"]
    if not rest:
        return []
    rewards = [point["reward"] for point in rest]
    floor, limit = 2 * min(rewards) - max(rewards), 2 * max(point["kl"] for point in rest)
    return [p for p in points if p["kind"] == "base" and (p["reward"] < floor or p["kl"] > limit)]


def line_labels(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """Labels of the eta lines: the etas of the last line, and the iteration at the end of each line without a
    point of its merge."""
    lines = [point for point in points if point["kind"] == "line"]
    last = max((point.get("iteration") or 0 for point in lines), default=0)
    merged = {point.get("iteration") for point in points if is_merge(point["kind"]) and point["kind"] != "liti"}
    labels = [(p, f"η {p['eta']:g}") for p in lines if (p.get("iteration") or 0) == last and p["eta"] not in (0, 1)]
    for iteration in dict.fromkeys(point.get("iteration") for point in lines):
        if iteration is not None and iteration not in merged:
            end = max((p for p in lines if p.get("iteration") == iteration), key=lambda point: point["eta"])
            labels.append((end, f"iteration {iteration}"))
    return labels


def front_text(points: Sequence[Point], width: int = 76) -> str:
    """The front as text of at most `width` characters (50 or more): reward over KL, the eta lines, every policy.

    points: as in front.json. RL trajectories are left out: a terminal has too few dots for them.
    """
    measured = [point for point in points if point["kind"] != "trajectory"]
    if not measured:
        return "no policy was measured"
    away = off_chart(measured)
    shown = [point for point in measured if point not in away]
    canvas = Canvas(max(40, width - 10), max(8, min(18, width // 4)), shown)
    for iteration in dict.fromkeys(point.get("iteration") for point in shown if point["kind"] == "line"):
        path = [p for p in shown if p["kind"] == "line" and p.get("iteration") == iteration]
        for start, end in pairwise(sorted(path, key=lambda point: point["eta"])):
            canvas.line(start, end)
    for point in shown:
        canvas.bar(point)
    order = ("line", "policy", "liti", "base", "sft")  # then the other merges
    for point in sorted(shown, key=lambda point: order.index(point["kind"]) if point["kind"] in order else len(order)):
        canvas.mark(point)
    for point in shown:
        if point["kind"] in ("base", "sft"):
            canvas.write(point, title_of(point), over_lines=True)
        elif is_merge(point["kind"]):
            canvas.write(point, label_of(point), over_lines=True)
    for point, text in line_labels(shown):
        canvas.write(point, text.removeprefix("η "), over_lines=not text.startswith("η"))
    barred = any(is_barred(p) and None not in ends_of(p) for p in shown)
    notes = ["⡇ 95 % interval of the reward"] if barred else []
    notes += [f"off the chart: {title_of(p)}, reward {fixed(p['reward'], 2)} at KL {fixed(p['kl'], 2)}" for p in away]
    below = [*legend(shown, width - 10), *notes]
    return "\n".join([*frame(canvas, start_of(measured)), *(f"{'':10}{line}" for line in below)])


def frame(canvas: Canvas, start: str) -> list[str]:
    """The rows of the canvas with both axes, three numbers on each. `start`: the policy to which KL is measured."""
    low, high = canvas.y
    ticks = {0: low, (canvas.height - 1) // 2: low + (high - low) * ((canvas.height - 1) // 2) / (canvas.height - 1),
             canvas.height - 1: high}  # fmt: skip
    lines = ["  reward"]
    for index in reversed(range(canvas.height)):
        figure = f"{ticks[index]:8.3g} ┤" if index in ticks else f"{'':8} │"
        lines.append(figure + canvas.row(index))
    left, middle, right = (f"{value:.3g}" for value in (canvas.x[0], sum(canvas.x) / 2, canvas.x[1]))
    half = canvas.width // 2
    lines.append(f"{'':8} └" + "─" * canvas.width)
    lines.append(f"{'':10}{left:<{half - len(middle) // 2}}{middle}".ljust(10 + canvas.width - len(right)) + right)
    lines.append(f"{f'KL to the {start} policy, nats per sequence':>{10 + canvas.width}}")
    return lines


def legend(points: Sequence[Point], width: int) -> list[str]:
    """The meaning of the glyphs without labels, in lines of at most `width` characters."""
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    names = {"policy": word_of("policy"), "line": line_word({end_of(p) for p in points if p["kind"] == "line"})}
    found = [f"{glyph_of(kind)} {name}" for kind, name in names.items() if kind in kinds]
    others = [kind for kind in kinds if is_merge(kind) and kind not in ("slerp", "liti")]
    if others:
        found.append(f"{glyph_of(others[0])} {', '.join(map(word_of, others))}")
    return wrap("   ".join(found), width)
