"""stdin, stdout and stderr as a command finds them: closed by the caller (`>&-`), or of an encoding other than UTF-8.

A closed descriptor is the number that the next opened file gets: a weights file would receive what native code prints.
Python sets the stream to None besides, and every `write` is an AttributeError.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import stat
import sys
from typing import TextIO

__all__ = ["drop_unread", "settle_streams"]

ESCAPE = "gemma2.escape"


def settle_streams() -> None:
    """Put the null device where a stream is closed; escape what the encoding of a stream cannot express."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, so `number` itself
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    codecs.register_error(ESCAPE, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Characters as `\\uXXXX`, in pairs beyond the basic plane: JSON reads them as the characters that they were."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (int.from_bytes(units[place : place + 2], "big") for place in range(0, len(units), 2))
    return "".join(f"\\u{unit:04x}" for unit in pairs), error.end


def drop_unread() -> bool:
    """Send to the null device what nobody reads any more (`gemma2 ... | head`). False where all are still read.

    The rest of a buffer would fail again when the interpreter shuts down, with exit code 120.
    """
    gone = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(gone)


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe or socket without a reader."""
    try:
        number = stream.fileno()
        mode = os.fstat(number).st_mode
    except (OSError, ValueError):
        return False
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return False
    asked = select.poll()
    asked.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
