"""Scores by which elements are chosen: SCE's variance over the models, Arcee Fusion's importance (numba).

Scores are the bits of fp32 numbers of 0 or more, which order like the numbers; the arithmetic before is fp64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .dense import CONTRACT, REORDER
from .dtypes import float_bits, value
from .native import compiled
from .number_formats import Doubles, Stored

__all__ = ["CHUNK", "Bits", "divergence", "importances", "variances"]

CHUNK = 1024  # elements: the fp64 rows of a chunk stay in the first two levels of the cache
LOG2_E, MAGIC = 1.4426950408889634, 6755399441055744.0  # MAGIC + n has the integer n in its lowest bits
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
SMALLEST = -700.0  # exp of what is below counts as exp of this: 1e-304
Bits = NDArray[np.uint32]


@compiled()
def variances_of_two(x: Doubles, y: Doubles, out: Bits) -> None:
    """`variances` of two models, the most common merge, in one loop."""
    for i in range(out.size):
        mean = (x[i] + y[i]) * 0.5
        total = (x[i] - mean) * (x[i] - mean) + (y[i] - mean) * (y[i] - mean)
        out[i] = float_bits(np.float32(total * 0.5))


@compiled(error_model="numpy")
def variances(deltas: Doubles, mean: Doubles, total: Doubles, out: Bits) -> None:
    """Bits of the variance over the models, as fp32; `mean` and `total` are work space."""
    models = np.float64(len(deltas))
    if len(deltas) == 2:
        variances_of_two(deltas[0, : out.size], deltas[1, : out.size], out)
        return
    for i in range(out.size):
        mean[i], total[i] = 0.0, 0.0
    for m in range(len(deltas)):
        own = deltas[m, : out.size]
        for i in range(out.size):
            mean[i] += own[i]
    for i in range(out.size):
        mean[i] = mean[i] / models
    for m in range(len(deltas)):
        own = deltas[m, : out.size]
        for i in range(out.size):
            total[i] += (own[i] - mean[i]) * (own[i] - mean[i])
    for i in range(out.size):
        out[i] = float_bits(np.float32(total[i] / models))


@compiled(fastmath=CONTRACT)
def exponentials(x: Stored, largest: float, out: Doubles) -> None:
    """`out = exp(x - largest)`, right to the last bits: x - largest = n log 2 + r, and a polynomial of r."""
    for i in range(out.size):
        power = max(np.float64(value(x[i])) - largest, SMALLEST)
        shifted = power * LOG2_E + MAGIC
        n = shifted - MAGIC
        r = (power - n * LN2_HIGH) - n * LN2_LOW
        p = r * (1 / 39916800.0) + 1 / 3628800.0
        p = p * r + 1 / 362880.0
        p = p * r + 1 / 40320.0
        p = p * r + 1 / 5040.0
        p = p * r + 1 / 720.0
        p = p * r + 1 / 120.0
        p = p * r + 1 / 24.0
        p = p * r + 1 / 6.0
        p = p * r + 0.5
        p = p * r + 1.0
        p = p * r + 1.0
        bits = np.float64(p).view(np.int64) + (np.float64(shifted).view(np.int64) << np.int64(52))
        out[i] = np.int64(bits).view(np.float64)


@compiled(fastmath={"nnan", "nsz", "reassoc"})
def largest_of(x: Stored) -> np.float32:
    """Return the largest element; of a row with NaN, which is refused later, any."""
    largest = np.float32(-np.inf)
    for i in range(x.size):
        own = value(x[i])
        largest = own if own > largest else largest
    return largest


@compiled()
def take_gaps(x: Stored, y: Stored, tops: tuple[float, float], out: Doubles) -> None:
    """`out = (x - top of x) - (y - top of y)`; in this order, since the numbers may be of any size."""
    first, second = tops
    for i in range(out.size):
        out[i] = (np.float64(value(x[i])) - first) - (np.float64(value(y[i])) - second)


@compiled(fastmath=REORDER)
def add_shares(gaps: Doubles, own: Doubles, other: Doubles) -> tuple[float, float, float]:
    """Return the sums of own, of other, and of own * gaps."""
    first, second, both = 0.0, 0.0, 0.0
    for i in range(own.size):
        first += own[i]
        second += other[i]
        both += own[i] * gaps[i]
    return first, second, both


@compiled(error_model="numpy")
def divergence(model: Stored, base: Stored, work: Doubles) -> float:
    """Return KL(softmax(model) | softmax(base)) of a row, at least 0. `work` (3, CHUNK)."""
    tops = np.float64(largest_of(model)), np.float64(largest_of(base))
    first, second, both = 0.0, 0.0, 0.0
    for begin in range(0, model.size, CHUNK):
        size = min(CHUNK, model.size - begin)
        x, y = model[begin : begin + size], base[begin : begin + size]
        own, other, gaps = work[0, :size], work[1, :size], work[2, :size]
        exponentials(x, tops[0], own)
        exponentials(y, tops[1], other)
        take_gaps(x, y, tops, gaps)
        sums = add_shares(gaps, own, other)
        first, second, both = first + sums[0], second + sums[1], both + sums[2]
    return max(both / first - math.log(first) + math.log(second), 0.0)


@compiled()
def importances(deltas: Doubles, factor: float, out: Bits) -> None:
    """Bits of |d| * factor, as fp32."""
    own = deltas[0, : out.size]
    for i in range(out.size):
        out[i] = float_bits(np.float32(abs(own[i]) * factor))
