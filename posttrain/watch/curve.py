"""A curve of bounded size, and its drawing in characters. Pure.

When a curve is full, neighbouring points become their mean, so 100,000 steps take the memory of a few hundred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        if not (math.isfinite(value) and math.isfinite(step)):
            return
        if self._points and self._points[-1][2] < self.width:
            self._points[-1] = _joined(self._points[-1], (step, value, 1))
            return
        if len(self._points) == self.most:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_joined(first, second) for first, second in pairs]
            self.width *= 2
        self._points.append((step, value, 1))

    def points(self, most: int | None = None) -> list[tuple[float, float]]:
        """Return the points, at most `most` of them: means of neighbours."""
        found = self._points
        while most is not None and len(found) > most:
            rest = found[-1:] if len(found) % 2 else []
            found = [_joined(a, b) for a, b in zip(found[::2], found[1::2], strict=False)] + rest
        return [(step, mean) for step, mean, _ in found]


def _joined(first: tuple[float, float, int], second: tuple[float, float, int]) -> tuple[float, float, int]:
    count = first[2] + second[2]
    # Shares first: the sum of two large values may be infinite.
    return second[0], first[1] * (first[2] / count) + second[1] * (second[2] / count), count


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the last values as bars, `width` at most; from the lowest of them to the highest."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return BARS[0] * len(shown)
    scale = (len(BARS) - 1) / (high / 2 - low / 2) / 2
    return "".join(BARS[round((value - low) * scale)] if math.isfinite(value - low) else BARS[-1] for value in shown)
