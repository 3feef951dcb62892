"""Sets of byte ranges [first, end): what has arrived, and what is asked for with one request each."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

__all__ = ["Ranges"]


class Ranges:
    """Ranges that neither overlap nor touch, in ascending order."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []
        for first, end in ranges:
            self.add(first, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._firsts, self._ends, strict=True)))

    def copy(self) -> Ranges:
        """Return a set of the same ranges."""
        return Ranges(self)

    @property
    def total(self) -> int:
        """The number of bytes."""
        return sum(self._ends) - sum(self._firsts)

    def add(self, first: int, end: int) -> None:
        """Add a range, which may overlap others."""
        if first >= end:
            return
        low, high = bisect_left(self._ends, first), bisect_right(self._firsts, end)
        if low < high:
            first, end = min(first, self._firsts[low]), max(end, self._ends[high - 1])
        self._firsts[low:high], self._ends[low:high] = [first], [end]

    def covers(self, first: int, end: int) -> bool:
        """Whether every byte of a range is in the set."""
        place = bisect_right(self._firsts, first) - 1
        return first >= end or (place >= 0 and self._ends[place] >= end)

    def missing(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of a range that are not in the set."""
        found = []
        for start, stop in self:
            if stop <= first or start >= end:
                continue
            if start > first:
                found.append((first, start))
            first = max(first, stop)
        return [*found, (first, end)] if first < end else found
