"""Parquet and arrow files, which hold columns: their batches of rows, their number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError

from .folders import format_of

__all__ = ["batches_of", "is_column_file", "parquet_rows"]

BATCH = 1024  # rows that are read at once
READ_BYTES = 65_536


def is_column_file(path: Path) -> bool:
    """Whether a file holds columns."""
    return format_of(path) in (".parquet", ".arrow")


def parquet_rows(path: Path) -> int:
    """Rows of a parquet file, from its footer."""
    with _open_parquet(path) as file:
        return int(file.metadata.num_rows)


def batches_of(path: Path) -> Iterator[Any]:
    """The rows of a column file as record batches of pyarrow. Raises InputError for a damaged file."""
    if format_of(path) == ".parquet":
        with _open_parquet(path) as file:
            yield from file.iter_batches(batch_size=BATCH)
        return
    yield from _arrow_batches(path)


def _open_parquet(path: Path) -> Any:  # noqa: ANN401
    import pyarrow
    import pyarrow.parquet

    try:
        # Unbuffered, a row group of a million rows takes a tenth of the memory.
        return pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is not a readable parquet file ({detail})", "write it again") from error


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of an arrow file as `save_to_disk` of datasets writes it (the stream format)."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, BATCH):
                    yield batch.slice(start, BATCH)
    except (pyarrow.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is not a readable arrow file ({detail})", "save the data set again") from error
