"""The lines that were added to a JSONL file since the last look. The file is never read as a whole a second time.

A torn last line waits until it is complete. A resume replaces the file by its beginning (`Run.rewind`), and a run that
starts over by an empty one: another inode, a shorter file, or other bytes before the place that was reached. Then the
lines come again from the first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemma2.core.json_files import JsonObject

__all__ = ["LineTail"]

MARK = 64  # bytes before the place that was reached
CHUNK = 1 << 20  # bytes


class LineTail:
    """Follows one file, which may not exist yet, and may vanish."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0  # bytes, at the beginning of a line
        self.unreadable = 0  # complete lines that are not JSON objects
        self._seen: tuple[int, int, int] | None = None  # inode, size, time of change
        self._mark = b""
        self._file: BinaryIO | None = None

    def restarted(self) -> bool:
        """Look at the file. True if it is no longer the one that was read: `rows` begins with its first line then."""
        self.close()
        try:
            self._file = self.path.open("rb")
            status = os.fstat(self._file.fileno())
        except OSError:
            return False  # it may come again
        seen = status.st_ino, status.st_size, status.st_mtime_ns
        if seen == self._seen:
            self.close()
            return False
        same = self._seen is None or (
            seen[0] == self._seen[0] and status.st_size >= self.offset and self._before() == self._mark
        )
        self._seen = seen
        if not same:
            self.offset, self.unreadable, self._mark = 0, 0, b""
        return not same

    def rows(self) -> Iterator[JsonObject]:
        """Yield the objects on the lines that are new since the last call, after `restarted`."""
        if self._file is None:
            return
        try:
            self._file.seek(self.offset)
            rest = b""
            while chunk := self._file.read(CHUNK):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self.offset += len(line) + 1
                    row = _object(line)
                    if row is None:
                        self.unreadable += bool(line.strip())
                    else:
                        yield row
            self._mark = self._before()
        except OSError:
            self._seen = None if self.offset == 0 else self._seen
        finally:
            self.close()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _before(self) -> bytes:
        """The bytes before the place that was reached."""
        if self._file is None:
            return b""
        begin = max(0, self.offset - MARK)
        self._file.seek(begin)
        return self._file.read(self.offset - begin)


def _object(line: bytes) -> JsonObject | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
