"""Passes over a range of one tensor in all operands: read, compute, write, without returning to Python in between.

Each step in a Python thread takes 0.1 ms in which no other thread runs: with steps of 256 Ki elements a fifth of the
whole merge. So these loops call the system's `pread` and `pwrite` themselves. They return where something failed, and
the caller repeats that step in Python to learn why.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from .dense import BLOCK, check_sum, combine, gram
from .dtypes import Bytes, Doubles, Floats, Out, Stored, compiled

__all__ = ["DONE", "NOT_FINITE", "blend", "load", "measure"]

Longs = NDArray[np.int64]

# The codes that a pass returns: DONE, NOT_FINITE, k > 0 (operand k - 1 could not be read), or < NOT_FINITE (output
# NOT_FINITE - 1 - code could not be written).
DONE, NOT_FINITE = 0, -1
RETRIES = 3  # a signal may interrupt a call

pread = types.ExternalFunction("pread", types.intp(types.intc, types.voidptr, types.uintp, types.int64))
pwrite = types.ExternalFunction("pwrite", types.intp(types.intc, types.voidptr, types.uintp, types.int64))


@compiled(inner=True)
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


@compiled(inner=True)
def write_all(descriptor: int, offset: int, data: Bytes) -> bool:
    """Write all of `data` to a file. False if an error persists."""
    done = 0
    failures = 0
    while done < data.size:
        put = pwrite(np.int32(descriptor), data[done:].ctypes, np.uint64(data.size - done), np.int64(offset + done))
        if put <= 0:
            failures += 1
            if failures > RETRIES:
                return False
        else:
            done += put
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


@compiled()
def measure(files: Longs, span: tuple[int, int, int], based: bool, stored: Stored, products: Doubles) -> int:
    """Inner products of elements [first, first + count), `cut` at a time. Returns a code.

    span      (first, count, cut); cut is a multiple of BLOCK
    stored    (K, >= cut) work space of the operands' dtype, see `gram`
    products  (ceil(count / BLOCK), 1 + pairs): see `gram`
    """
    first, total, cut = span
    for begin in range(0, total, cut):
        count = min(cut, total - begin)
        failed = load(files, first + begin, count, stored)
        if failed:
            return failed
        low = begin // BLOCK
        gram(stored, count, based, products[low : low + (count + BLOCK - 1) // BLOCK])
    return DONE


@compiled()
def blend(
    files: Longs,
    span: tuple[int, int, int],
    weights: Doubles,
    targets: Longs,
    space: tuple[Stored, Floats, Out],
    checks: NDArray[np.uint64],
    based: bool,
    products: Doubles,
) -> int:
    """Combine elements [first, first + count) and write them, `cut` at a time. Returns a code.

    span      (first, count, cut); cut is a multiple of BLOCK
    weights   (E, K) fp64
    targets   (E, 2): descriptor and offset of the tensor in each output
    space     stored (K, >= cut), total (BLOCK,) fp32, out (E, >= cut): see `combine`
    checks    (E,) to which the check sums of the written data are added
    products  as in `measure`, filled from the same read; without rows it is not filled
    """
    first, total, cut = span
    stored, sums, out = space
    for begin in range(0, total, cut):
        count = min(cut, total - begin)
        failed = load(files, first + begin, count, stored)
        if failed:
            return failed
        if len(products):
            low = begin // BLOCK
            gram(stored, count, based, products[low : low + (count + BLOCK - 1) // BLOCK])
        if not combine(stored, count, weights, sums, out):
            return NOT_FINITE
        for e in range(len(targets)):
            data = out[e, :count].view(np.uint8)
            place = (first + begin) * out.itemsize
            checks[e] += check_sum(data, targets[e, 1] + place)
            if not write_all(targets[e, 0], targets[e, 1] + place, data):
                return NOT_FINITE - 1 - e
    return DONE
