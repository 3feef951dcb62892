"""A curve of bounded size, and its drawing in characters. Pure.

When a curve is full, neighbouring points become their mean, so 100,000 steps take the memory of a few hundred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["Curve", "sparkline"]

MOST = 400  # points
BARS = "▁▂▃▄▅▆▇█"


class Curve:
    """The points (step, value) of one metric. Values that are not finite are left out."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.width = 1  # values in a point, except the last, which may hold fewer
        self._points: list[tuple[float, float, int]] = []  # last step, mean, count

    def add(self, step: float, value: float) -> None:
        """Append a value."""
        if value - value != 0 or step - step != 0:  # not finite
            return
        if self._points and self._points[-1][2] < self.width:
            self._points[-1] = _joined(self._points[-1], (step, value, 1))
            return
        if len(self._points) == self.most:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_joined(first, second) for first, second in pairs]
            self.width *= 2
        self._points.append((step, value, 1))

    def points(self) -> list[tuple[float, float]]:
        """Return the points."""
        return [(step, mean) for step, mean, _ in self._points]


def _joined(first: tuple[float, float, int], second: tuple[float, float, int]) -> tuple[float, float, int]:
    count = first[2] + second[2]
    # Shares first: the sum of two large values may be infinite.
    return second[0], first[1] * (first[2] / count) + second[1] * (second[2] / count), count


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the values as bars, from the lowest to the highest; of more than `width`, means of neighbours."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    edges = [i * len(finite) // count for i in range(count + 1)] if count else []
    shown = [_mean(finite[begin:end]) for begin, end in pairwise(edges)]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high / 2 - low / 2 == 0:
        return BARS[0] * len(shown)
    scale = (len(BARS) - 1) / (high / 2 - low / 2)  # halves: the difference of large values may be infinite
    return "".join(BARS[round((value / 2 - low / 2) * scale)] for value in shown)


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)
