"""Which elements of a task vector are the largest: exact thresholds by counting, without sorting (radix select).

The magnitude of an fp32 number orders as its bit pattern does. A first pass counts the upper 16 bits, a second the
lower 16 bits of the elements in the bucket that holds the wanted rank. Counts are integers: they add up over cuts,
tensors and threads in any order.

k = max(1, floor(density * n)); elements equal to the k-th largest are all kept, whatever their order, so that more than
k may stay. The papers do not say how they round, and their sorts keep k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import Floats, compiled, value
from .kernels import BLOCK

__all__ = ["BUCKETS", "bucket_of_rank", "histogram", "kept_ranks", "magnitude"]

BUCKETS = 1 << 16
U16, LOW_BITS, MAGNITUDE, INFINITE = np.uint32(16), np.uint32(0xFFFF), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)

Counts = NDArray[np.int64]


def kept_ranks(count: int, density: float, gamma: float = 0.0) -> tuple[int, int]:
    """First and last rank (1 is the largest magnitude) that stay of `count` elements.

    k = max(1, floor(density * count)) stay below the largest floor(gamma * count); gamma is at most 1 - density.
    """
    kept = min(max(1, int(density * count + 1e-6)), count)  # 0.29 * 100 is 28.999999999999996
    dropped = min(int(min(gamma, 1.0 - density) * count + 1e-6), count - kept)
    return dropped + 1, dropped + kept


def bucket_of_rank(counts: Counts, rank: int) -> tuple[int, int]:
    """The bucket that holds the rank-th largest, and its rank inside the bucket; ranks count from 1.

    counts  (buckets,) elements per bucket, in ascending order of magnitude
    """
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    bucket = len(counts) - 1 - place
    return bucket, rank - int(above[place] - counts[bucket])


def magnitude(leading: int, trailing: int) -> float:
    """The fp32 number with these upper and lower 16 bits."""
    return float(np.array([leading << 16 | trailing], np.uint32).view(np.float32)[0])


@compiled()
def subtract(x: Any, base: Any, out: Floats) -> None:
    """`out = x - base`, of bf16 bits or of fp32."""
    for i in range(out.size):
        out[i] = value(x[i]) - value(base[i])


@compiled()
def to_magnitude_bits(delta: Floats) -> Any:
    """Replace deltas by the bit patterns of their magnitudes, which order alike: a uint32 view (n,)."""
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        bits[i] = bits[i] & MAGNITUDE
    return bits


@compiled()
def largest_bits(delta: Floats) -> Any:
    """The bit pattern of the largest |delta|: INFINITE or above when one is Inf or NaN."""
    largest = np.uint32(0)
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        own = np.uint32(bits[i] & MAGNITUDE)
        largest = own if own > largest else largest
    return largest


@compiled()
def histogram(stored: Any, count: int, targets: Counts, out: Counts) -> bool:
    """Count magnitudes of deltas by their bit pattern; adds to `out`. False when one of them is Inf or NaN.

    stored   (M + 1, >= count) as `kernels.gram` wants it, row 0 the base
    targets  (Q, 2): row of a model (1..M), and -1 to count the upper 16 bits, or upper bits: the lower 16 bits of the
             elements that have these are counted
    out      (Q, BUCKETS) int64
    """
    finite = True
    parts = np.empty((4, BUCKETS // 2), np.int32)
    space = np.empty(BLOCK, np.float32)
    found = np.empty(BLOCK + 1, np.uint32)
    for q in range(targets.shape[0]):
        row, prefix = targets[q, 0], targets[q, 1]
        parts[:] = 0
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            delta = space[: end - start]
            subtract(stored[row, start:end], stored[0, start:end], delta)
            finite &= largest_bits(delta) < INFINITE
            bits = to_magnitude_bits(delta)
            if prefix < 0:
                count_leading(bits, parts)
            else:
                count_trailing(bits, np.uint32(prefix), found, out[q])
        if prefix < 0:
            add_counts(parts, out[q, : BUCKETS // 2])
    return finite


@compiled()
def add_counts(parts: NDArray[np.int32], out: Counts) -> None:
    """`out += sum over the four parts`"""
    first, second, third, fourth = parts[0], parts[1], parts[2], parts[3]
    for i in range(out.size):
        out[i] += np.int64(first[i]) + np.int64(second[i]) + np.int64(third[i]) + np.int64(fourth[i])


@compiled()
def count_leading(bits: NDArray[np.uint32], out: NDArray[np.int32]) -> None:
    """Counts of `bits >> 16` to (4, n): each waits for the last count of an equal one, and equal neighbours abound."""
    first, second, third, fourth = out[0], out[1], out[2], out[3]
    for i in range(bits.size // 4):
        first[bits[4 * i] >> U16] += 1
        second[bits[4 * i + 1] >> U16] += 1
        third[bits[4 * i + 2] >> U16] += 1
        fourth[bits[4 * i + 3] >> U16] += 1
    for i in range(bits.size // 4 * 4, bits.size):
        first[bits[i] >> U16] += 1


@compiled()
def count_trailing(bits: NDArray[np.uint32], prefix: Any, found: NDArray[np.uint32], out: Counts) -> None:
    """Counts of the lower 16 bits where the upper ones are `prefix`; `found` (n + 1,) is work space."""
    end = np.int64(0)
    for i in range(bits.size):  # gathered first, without a branch to guess
        found[end] = bits[i] & LOW_BITS
        end += np.int64(bits[i] >> U16 == prefix)
    for i in range(end):
        out[found[i]] += 1
