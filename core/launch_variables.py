"""The variables with which a launcher says how many processes there are and which one this is, read and checked.

A number that cannot be read would be a traceback in torch or accelerate, at the first of the places that read it.
"""

from __future__ import annotations

import os
import re

from .errors import UsageError

__all__ = ["launched_here", "launched_size"]

SIZE, RANK, HERE, LOCAL, PORT = "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"
FIX = f"unset {RANK}, {LOCAL}, {SIZE} and {HERE}, or start the command with torchrun, which sets them"
LAST_PORT = 65535


def launched_size() -> int:
    """Return the number of processes that the launcher announced, 1 without one.

    Raises UsageError for a variable of the launcher that is no number, or does not fit the others.
    """
    size = _number(SIZE, 1, 1)
    rank = _number(RANK, 0, 0)
    if rank >= size:
        raise UsageError(f"the environment variable {RANK} is {rank}, and {SIZE} says {size}", FIX)
    _number(LOCAL, -1, -1)  # read by accelerate, in a single process too
    if size > 1:
        _number(PORT, 1, 1, LAST_PORT)
    return size


def launched_here() -> int:
    """Return the number of processes on this machine; without a word about it, all of them."""
    return _number(HERE, launched_size(), 1)


def _number(name: str, default: int, least: int, most: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    number = int(text) if re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text) else None
    if number is None or number < least or (most is not None and number > most):
        raise UsageError(f"the environment variable {name} is {text!r}", FIX)
    return number
