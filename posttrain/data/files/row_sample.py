"""A part of the rows of large files, for checks that must not read all of them: the first ones and some at random.

Every file is read once to its end, so that its rows are counted; only the rows that are chosen are parsed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .column_files import batches_of, is_column_file
from .formats import line_reader, lines_of, rows_in
from .row import OnBad, Row

__all__ = ["RowSample"]

Item = TypeVar("Item")
Made = TypeVar("Made")
FEWEST = 5  # rows of one of many files


@dataclass
class RowSample:
    """The first `first` rows of a data set and `drawn` others, spread over its files.

    totals   rows of every file that was read
    counted  rows of every file that were chosen
    """

    first: int
    drawn: int
    seed: int = 0
    totals: dict[Path, int] = field(default_factory=dict)
    counted: dict[Path, int] = field(default_factory=dict)

    def is_whole(self, files: Iterable[Path]) -> bool:
        """Whether every row of these files was chosen."""
        return all(self.totals[file] == self.counted[file] for file in files)

    def rows(self, files: list[Path], on_bad: OnBad | None = None) -> Iterator[Row]:
        """The chosen rows, in file order. Raises InputError like a reading of all rows would for a chosen one."""
        for file in files:
            yield from self._rows_of(file, len(files), on_bad)

    def _rows_of(self, path: Path, files: int, on_bad: OnBad | None) -> Iterator[Row]:
        if is_column_file(path):
            yield from self._chosen(path, files, _places(path), _column_row)
            return
        read = line_reader(path)
        if read is None:  # an array or a table has to be parsed to find where its rows end
            yield from self._chosen(path, files, rows_in(path, on_bad), lambda row: row)
            return
        for line in self._chosen(path, files, lines_of(path), lambda line: line):
            yield from read(line, on_bad)

    def _chosen(self, path: Path, files: int, items: Iterable[Item], make: Callable[[Item], Made]) -> list[Made]:
        """The items of one file that the sample holds (Vitter 1985, Algorithm R, behind the first ones)."""
        first, size = max(FEWEST, self.first // files), max(FEWEST, self.drawn // files)  # of each file
        draw = random.Random(f"{self.seed} {path.name}").random
        begin: list[Made] = []
        others: list[tuple[int, Made]] = []
        count = 0
        for item in items:
            place = count - first
            count += 1
            if place < 0:
                begin.append(make(item))
            elif place < size:
                others.append((place, make(item)))
            elif (slot := int(draw() * (place + 1))) < size:
                others[slot] = (place, make(item))
        self.totals[path], self.counted[path] = count, len(begin) + len(others)
        return begin + [made for _, made in sorted(others, key=lambda one: one[0])]


def _places(path: Path) -> Iterator[tuple[str, Any, int]]:
    """(file:row, batch, place in the batch) of every row of a column file."""
    number = 0
    for batch in batches_of(path):
        for place in range(batch.num_rows):
            number += 1
            yield f"{path}:{number}", batch, place


def _column_row(found: tuple[str, Any, int]) -> Row:
    where, batch, place = found
    return Row(where, batch.slice(place, 1).to_pylist()[0])
