"""An append-only file of JSON records that survives a kill: finished records stay, a torn end is dropped.

Every `append` ends with fsync. A kill, or a power cut, can only damage what was being appended: at the next opening the
file is cut behind the last whole record. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from gemma2.core.json_files import JsonMapping, JsonObject, parse_json
from gemma2.posttrain.data.sources import to_line

__all__ = ["Journal"]


class Journal:
    """Starts or continues a journal; the file appears with the first record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = _whole(path)  # bytes of whole records
        if path.exists() and path.stat().st_size > self.size:
            os.truncate(path, self.size)
        self._file = path.open("ab") if self.size else None

    def append(self, records: Iterable[JsonMapping]) -> None:
        """Write records and wait until the disk has them."""
        lines = b"".join(map(to_line, records))
        if not lines:
            return
        if self._file is None:
            self._file = self.path.open("ab")
            _flush_folder(self.path.parent)
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.size += len(lines)

    def records(self) -> Iterator[JsonObject]:
        """The records at the start of the iteration, in order; records that are appended meanwhile do not appear."""
        left = self.size
        if not left:
            return
        with self.path.open("rb") as file:
            while left > 0:
                line = file.readline()
                left -= len(line)
                yield parse_json(line)

    def close(self) -> None:
        """Close the file; all is on disk already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole(path: Path) -> int:
    """Bytes up to the first line that is not a record."""
    size = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not _is_record(line):
                    break
                size += len(line)
    return size


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _flush_folder(folder: Path) -> None:
    """Make the name of a file that was created in `folder` as durable as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
