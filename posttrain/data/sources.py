"""The rows behind a data path.

    PATH                          JSON lines, a JSON array, CSV, TSV, parquet, arrow; *.txt with one prompt a line;
                                  also packed: *.gz, *.zst
    DIR[@SPLIT]                   an output of generate, filter or reward pairs, a data set saved to disk, a clone of a
                                  hub data set, or a plain folder of such files (`files/folders.py`)
    ORG/NAME[:CONFIG][@SPLIT]     a data set of the hub (split: train), copied into the cache as parquet

Torch-free. Every refusal names file, line (of a text file) or row (of a column file), the fault and the fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from gemma2.core.errors import InputError

from .files.folders import FolderFiles, all_files_inside, files_inside, format_of
from .files.formats import count_in, rows_in
from .files.hub_sets import from_hub, is_hub_set
from .files.row import ColumnNames, OnBad, Row, kind
from .files.row_sample import RowSample
from .files.shards import ShardWriter, to_line

__all__ = [
    "ColumnNames",
    "OnBad",
    "Row",
    "RowSample",
    "ShardWriter",
    "count_rows",
    "data_files",
    "evaluation_files",
    "find_files",
    "iter_rows",
    "kind",
    "no_rows",
    "rows_of",
    "to_line",
]


def data_files(path: Path) -> list[Path]:
    """The files that a data path names, in the order in which they are read.

    Raises InputError when the path holds none, when an output is unfinished, or when the hub lacks the set.
    """
    return find_files(path).read


def evaluation_files(path: Path) -> list[Path]:
    """The files of a data path, of a folder those of every split: an evaluation set is most often the test split."""
    return all_files_inside(path) if path.is_dir() else data_files(path)


def rows_of(files: Iterable[Path]) -> Iterator[Row]:
    """The rows of these files, streamed. Raises InputError at the first row that cannot be read."""
    for file in files:
        yield from rows_in(file)


def find_files(path: Path) -> FolderFiles:
    """The files that a data path names, and what is left aside in its folder. Raises InputError like `data_files`."""
    if path.is_dir():
        return files_inside(path)
    if path.is_file():
        return FolderFiles([path], [])
    if path.exists():
        raise InputError(f"{path} is not a regular file", "give a data file or a directory")
    folder, at, split = str(path).rpartition("@")
    if at and Path(folder).is_dir():
        return files_inside(Path(folder), split)
    if is_hub_set(path):
        return FolderFiles([from_hub(str(path))], [])
    raise InputError(f"{path} does not exist", "give a data file, a directory, or a hub data set ORG/NAME")


def iter_rows(
    path: Path,
    limit: int | None = None,
    on_bad: OnBad | None = None,
    columns: ColumnNames | None = None,
    sample: RowSample | None = None,
) -> Iterator[Row]:
    """The rows behind a data path, at most `limit`, streamed, with the names that `columns` gives them.

    sample  reads a part of large files, for checks

    Raises InputError at the first row that cannot be read; with `on_bad` the error goes there and the row is left out.
    """
    files = data_files(path)
    rows = (row for file in files for row in rows_in(file, on_bad)) if sample is None else sample.rows(files, on_bad)
    for row in islice(rows, limit):
        yield row if columns is None else Row(row.where, columns.apply(row.columns), row.aside)


def count_rows(path: Path) -> int:
    """Rows behind a data path. Raises InputError when the path holds none."""
    rows = sum(count_in(file) for file in data_files(path))
    if rows == 0:
        raise no_rows(path)
    return rows


def no_rows(path: Path) -> InputError:
    """The error for a data path without rows, with what a row is in its format."""
    formats = {format_of(file) for file in data_files(path)}
    if formats <= {".csv", ".tsv"}:
        hint = "write a line with the names of its columns, as in prompt,completion, and a row on each line below"
    elif formats <= {".txt"}:
        hint = "write one prompt per line"
    elif formats <= {".parquet", ".arrow"}:
        hint = "write its rows again, or give a file that has some"
    else:
        hint = "write one JSON object per line"
    return InputError(f"{path} has no rows", hint)
