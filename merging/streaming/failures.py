"""What a command that writes models does where the system fails: one line for the user, and no empty folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma2.core.errors import Gemma2Error, OutputError

__all__ = ["no_empty_parents", "system_refusals"]


@contextmanager
def system_refusals(out: Path) -> Iterator[None]:
    """Turn a failure of the system at any open, write, flush or rename into an OutputError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Gemma2Error):
            raise
        place = error.filename or out
        raise OutputError(
            f"{place}: {error.strerror or error}", "check the path, its permissions and the free space"
        ) from error


@contextmanager
def no_empty_parents(out: Path) -> Iterator[None]:
    """Remove the folders that were created for an output which then failed."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:  # the deepest first
            with suppress(OSError):  # not empty: another run writes there
                folder.rmdir()
        raise
