"""An append-only file of JSON records that survives a kill: finished records stay, a torn end is dropped.

Every `append` ends with fsync. A kill, or a power cut, can only damage what was being appended: at the next opening the
file is cut behind the last whole record. Every line ends with the CRC-32 of its record: one that rotted in front of
others is an error, since what comes after it was paid for, and one whose text changed is not taken for an answer.
Torch-free.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, parse_json
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.runs.run_directory import Run

__all__ = ["Journal", "journal_of"]

SUM = "crc32"
END = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\n')


def journal_of(run: Run, name: str) -> Journal:
    """The journal of that name of a run, in its checkpoints; of several processes rank 0 alone has it."""
    if not run.ranks.is_main:
        return Journal(None)
    run.checkpoints.mkdir(exist_ok=True)
    return Journal(run.checkpoints / name)


class Journal:
    """Starts or continues a journal; the file appears with the first record.

    One without a path keeps nothing: that of a process whose records rank 0 keeps.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.size = 0  # bytes of whole records
        self._file: BinaryIO | None = None
        if path is None:
            return
        self.size = _whole(path)
        if path.exists() and path.stat().st_size > self.size:
            os.truncate(path, self.size)
        self._file = path.open("ab") if self.size else None

    def append(self, records: Iterable[JsonMapping]) -> None:
        """Write records and wait until the disk has them."""
        if self.path is None:
            return
        lines = b"".join(_summed(to_line(record)) for record in records)
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
        if not left or self.path is None:
            return
        with self.path.open("rb") as file:
            while left > 0:
                line = file.readline()
                left -= len(line)
                record: JsonObject = parse_json(line)
                del record[SUM]
                yield record

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
    """Bytes up to the first line that is not a record. Raises InputError if records follow it."""
    size, broken, others = 0, 0, False
    if path.exists():
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not _is_record(line):
                    broken = broken or number
                    others = others or _is_object(line)
                elif broken:
                    raise InputError(f"{path}:{broken} is damaged, and records follow it", "start over with --force")
                else:
                    size += len(line)
    if size == 0 and others:
        raise InputError(f"{path} holds no record with its check sum", "start over with --force")
    return size


def _summed(line: bytes) -> bytes:
    """A line of JSON with the check sum of its object as last key."""
    body = line.rstrip(b"\n")
    return body[:-1] + f', "{SUM}": "{zlib.crc32(body):08x}"}}\n'.encode()


def _is_record(line: bytes) -> bool:
    found = END.search(line, max(len(line) - 24, 0))
    return found is not None and zlib.crc32(line[: found.start()] + b"}") == int(found[1], 16) and _is_object(line)


def _is_object(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _flush_folder(folder: Path) -> None:
    """Make the name of a file that was created in `folder` as durable as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
