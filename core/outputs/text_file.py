"""A text file that appears complete or not at all."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from gemma2.core.errors import OutputError

__all__ = ["write_text"]


def write_text(out: Path, text: str) -> Path:
    """Write `text` to `out` in one rename, creating a missing folder; return `out`.

    Raises OutputError if it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        try:
            # Bytes of a run's files that are not UTF-8 arrive here as lone surrogates.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write --out {out} ({error.strerror})", "choose another --out") from error
    return out


def _remove_stale(out: Path) -> None:
    """Remove what processes that were killed have left."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        number = path.name.rpartition("-")[2]
        if not number.isdecimal():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (OSError, OverflowError):  # of another user, or no number of a process
            continue
