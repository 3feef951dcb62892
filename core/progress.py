"""Progress of long runs: bars, notes, warnings. The library reports; `cli/terminal/console.py` decides how it looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["SILENT", "Progress", "Task"]


class Task(Protocol):
    """One bar. `fields` are live values shown next to it, for instance `reward=1.2`."""

    def advance(self, amount: float = 1, **fields: float | str) -> None: ...


class Progress(Protocol):
    """The receiver of a library function's reports: bars, notes and warnings, never results."""

    @contextmanager
    def task(self, label: str, total: float | None, unit: str) -> Iterator[Task]:
        """Open a bar. `unit` is `"bytes"`, `"tokens"`, `"steps"`, ... and `total` counts in it."""
        ...

    def note(self, text: str) -> None:
        """Write one line for the user to stderr."""
        ...

    def warn(self, text: str) -> None:
        """Write one line that deserves attention to stderr."""
        ...


class _Silent:
    def advance(self, amount: float = 1, **fields: float | str) -> None:
        return None

    @contextmanager
    def task(self, label: str, total: float | None, unit: str) -> Iterator[Task]:
        yield self

    def note(self, text: str) -> None:
        return None

    def warn(self, text: str) -> None:
        return None


SILENT: Progress = _Silent()
