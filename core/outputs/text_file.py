"""A text file that appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from gemma2.core.errors import OutputError

__all__ = ["write_text"]


def write_text(out: Path, text: str) -> Path:
    """Write `text` to `out` in one rename, making its folder where it is missing; returns `out`.

    Raises OutputError when it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            # What a file of the run has in bytes that are no UTF-8 comes here as lone surrogates.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write --out {out} ({error.strerror})", "choose another --out") from error
    return out
