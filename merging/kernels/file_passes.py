"""Reads inside kernels, for those that read many short pieces: each step in a Python thread takes 0.1 ms in which no
other thread runs. They return where something failed, and the caller repeats that step in Python to learn why.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .machine_code import External
from .native import compiled
from .number_formats import Bytes, Stored

__all__ = ["DONE", "load", "read_all"]

Longs = NDArray[np.int64]

DONE = 0  # the code that a pass returns; k > 0: operand k - 1 could not be read
RETRIES = 3  # a signal may interrupt a call

pread = External("pread", "intp", ("intc", "voidptr", "uintp", "int64"))


@compiled()
def read_all(descriptor: int, offset: int, into: Bytes) -> bool:
    """Fill `into` from a file. False if the file ends before, or an error persists."""
    done = 0
    failures = 0
    while done < into.size:
        got = pread(np.int32(descriptor), into[done:].ctypes, np.uint64(into.size - done), np.int64(offset + done))
        if got == 0:
            return False
        if got < 0:
            failures += 1
            if failures > RETRIES:
                return False
        else:
            done += got
    return True


@compiled()
def load(files: Longs, first: int, count: int, stored: Stored) -> int:
    """Read elements [first, first + count) of every operand into the rows of `stored` (K, >= count). Returns a code.

    files  (K, 2): descriptor and offset of each operand's tensor; a descriptor of -1 marks a row that is already filled
    """
    for k in range(len(files)):
        into = stored[k, :count].view(np.uint8)
        if files[k, 0] >= 0 and not read_all(files[k, 0], files[k, 1] + first * stored.itemsize, into):
            return k + 1
    return DONE
