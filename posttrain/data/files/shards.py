"""Writing rows: JSON lines, in shards."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping

__all__ = ["ShardWriter", "to_line"]


def to_line(columns: JsonMapping) -> bytes:
    """One row as a line of JSONL, UTF-8; dates and decimal numbers of column formats as texts.

    Raises InputError for what JSON cannot hold, such as the bytes of an image.
    """
    try:
        return (json.dumps(columns, ensure_ascii=False, default=_plain) + "\n").encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"a row holds half of a surrogate pair: {error.object[error.start : error.end]!r}",
            "write the whole character",
        ) from error


def _plain(value: object) -> str | float:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return str(value)
    raise InputError(f"a row holds {type(value).__name__}, which JSON lines cannot hold", "remove that column")


class ShardWriter:
    """Writes rows to `data-00000-of-0000N.jsonl`, `shard_rows` to a file, as the hub names them.

    N is known at the end: the files get their names when the block ends without an error. Without a row there is one
    empty file.
    """

    def __init__(self, directory: Path, shard_rows: int) -> None:
        self.directory = directory
        self.shard_rows = shard_rows
        self.rows = 0
        self._file: BinaryIO | None = None
        self._paths: list[Path] = []

    def write(self, row: JsonMapping) -> None:
        """Append one row."""
        if self._file is None or self.rows % self.shard_rows == 0:
            self._next()
        assert self._file is not None
        self._file.write(to_line(row))
        self.rows += 1

    def _next(self) -> None:
        self._close()
        self._paths.append(self.directory / f".data-{len(self._paths):05d}.tmp")
        self._file = self._paths[-1].open("wb")

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if not self._paths:
                self._next()
            self._close()
            for number, path in enumerate(self._paths):
                path.replace(self.directory / f"data-{number:05d}-of-{len(self._paths):05d}.jsonl")
            return
        # The error may be that of a full disk: nothing here may fail in its place, and the last file may not exist.
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        for path in self._paths:
            with suppress(OSError):
                path.unlink()
