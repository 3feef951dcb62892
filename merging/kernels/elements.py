"""Kernels of the merges that compute every element from those of the models: SCE, RAM, nearswap, Arcee Fusion.

With task vectors d_m = model_m - base, in fp64, element by element; numbers (fp64) are what the method decided before:

SCE       numbers = least, w_1 .. w_M. d_m is 0 where the variance over the models, rounded to fp32, is below `least`.
          Result: sum of w_m d_m over the models whose sign is that of the sum of all, divided by the sum of these w_m
RAM       numbers = threshold, f_1 .. f_M. Changed is |d| > threshold. Result: the mean of the models that changed the
          element; of one alone, f_m d_m
NEARSWAP  numbers = reach. Result: d cut to -reach .. reach
ARCEE     numbers = limit. Result: d where its score, |d| times the divergence of its row, rounded to fp32, is above
          `limit`, else 0. The divergence is KL(softmax(row of the model) | softmax(row of the base)), in nats

Sums are those of one unit, a row for ARCEE, else BLOCK elements from the start of the tensor: they do not depend on
the caller's cuts. Scores are counted by the bits of their fp32, which order like the numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dense import REORDER
from .dtypes import float_bits, store, value
from .native import compiled
from .number_formats import Doubles, Floats, Out, Stored
from .scores import CHUNK, Bits, divergence, importances, variances

__all__ = ["ARCEE", "HALF", "NEARSWAP", "RAM", "SCE", "combine_elements", "count_scores", "scratch", "sum_elements"]

SCE, RAM, NEARSWAP, ARCEE = range(4)
HALF = 1 << 16  # patterns of the upper, and of the lower bits of a score
U16, LOW = np.uint32(16), np.uint32(HALF - 1)
Longs = NDArray[np.int64]


Scratch = tuple[Doubles, Doubles, Bits, NDArray[np.int32]]


def scratch(models: int) -> Scratch:
    """Return work space for one call of the kernels below: deltas, three rows, bits, and counts of models."""
    bits, changed = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.int32)
    return np.empty((models, CHUNK)), np.empty((3, CHUNK)), bits, changed


@compiled()
def take_deltas(stored: Stored, begin: int, size: int, deltas: Doubles) -> None:
    """`deltas = models - base` of elements [begin, begin + size), (M, >= size)."""
    base = stored[0, begin : begin + size]
    for m in range(len(deltas)):
        x, out = stored[m + 1, begin : begin + size], deltas[m, :size]
        for i in range(out.size):
            out[i] = np.float64(value(x[i])) - np.float64(value(base[i]))


@compiled(fastmath=REORDER)
def dot(x: Doubles, y: Doubles) -> float:
    """Return the inner product."""
    total = 0.0
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@compiled(fastmath=REORDER)
def square_of(x: Stored) -> float:
    """Return the squared norm of stored elements."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(value(x[i])) * np.float64(value(x[i]))
    return total


# --- scores -----------------------------------------------------------------------------------------------------------


@compiled()
def scores(kind: int, deltas: Doubles, factor: float, space: Doubles, out: Bits) -> None:
    """Bits of the scores of a chunk. `space` (2, >= n)."""
    if kind == SCE:
        variances(deltas, space[0, : out.size], space[1, : out.size], out)
    else:
        importances(deltas, factor, out)


@compiled()
def count_bits(bits: Bits, bins: Longs, counts: Longs) -> None:
    """Count the upper halves; with bins, the lower halves of those whose upper half is one."""
    if len(bins) == 0:
        upper = counts[0]
        for i in range(bits.size):
            upper[bits[i] >> U16] += 1
    for b in range(len(bins)):
        wanted, lower = np.uint32(bins[b]), counts[b]
        for i in range(bits.size):
            if bits[i] >> U16 == wanted:
                lower[bits[i] & LOW] += 1


@compiled()
def count_scores(
    span: tuple[int, int], kind: int, space: tuple[Stored, Doubles], work: Scratch, bins: Longs, counts: Longs
) -> None:
    """Count the scores of elements.

    span    (count, unit)
    space   stored (M + 1, >= count), row 0 the base; and for ARCEE the divergence of each unit, which are filled where
            there are no bins, and read where there are
    work    from `scratch`
    bins    (B,) upper halves; none: all are counted by their upper half
    counts  (max(B, 1), HALF) to which the numbers of scores are added
    """
    count, unit = span
    stored, factors = space
    deltas, rows, bits, _ = work
    for low in range(0, count, unit):
        high = min(low + unit, count)
        if kind == ARCEE and len(bins) == 0:
            factors[low // unit] = divergence(stored[1, low:high], stored[0, low:high], rows)
        factor = factors[low // unit] if kind == ARCEE else 1.0
        for start in range(low, high, CHUNK):
            size = min(CHUNK, high - start)
            take_deltas(stored, start, size, deltas)
            scores(kind, deltas, factor, rows, bits[:size])
            count_bits(bits[:size], bins, counts)


# --- sums over a group ------------------------------------------------------------------------------------------------


@compiled()
def keep_where(bits: Bits, limit: np.uint32, own: Doubles) -> None:
    """Clear the elements whose score is below a limit."""
    for i in range(bits.size):
        own[i] = own[i] if bits[i] >= limit else 0.0


@compiled()
def select(deltas: Doubles, least: float, work: Doubles, bits: Bits) -> None:
    """SCE: clear the elements whose variance is below `least`; all stay where it is negative."""
    if least < 0.0:
        return
    variances(deltas, work[0, : bits.size], work[1, : bits.size], bits)
    limit = float_bits(np.float32(least)) if least < np.inf else np.uint32(0x7F800000)
    for m in range(len(deltas)):
        keep_where(bits, limit, deltas[m, : bits.size])


@compiled()
def count_changed(deltas: Doubles, threshold: float, changed: NDArray[np.int32]) -> None:
    """How many models changed each element."""
    for i in range(changed.size):
        changed[i] = 0
    for m in range(len(deltas)):
        own = deltas[m, : changed.size]
        for i in range(changed.size):
            changed[i] += np.int32(abs(own[i]) > threshold)


@compiled()
def count_own(own: Doubles, threshold: float, changed: NDArray[np.int32]) -> tuple[np.int32, np.int32]:
    """How many elements a model changed with others, and alone."""
    shared, alone = np.int32(0), np.int32(0)
    for i in range(own.size):
        mine = abs(own[i]) > threshold
        shared += np.int32(mine & (changed[i] > 1))
        alone += np.int32(mine & (changed[i] == 1))
    return shared, alone


@compiled()
def sum_elements(
    span: tuple[int, int], kind: int, numbers: Doubles, stored: Stored, work: Scratch, sums: Doubles
) -> None:
    """Sums of elements; span, stored and work as in `count_scores`.

    numbers  the first of those of the kind
    sums     (units, 2 M) to fill, for each model: SCE the squared norm of the selected elements, and 0; RAM how many
             elements it changed with others, and alone
    """
    count, unit = span
    models = len(stored) - 1
    deltas, rows, bits, changed = work
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        own = sums[start // unit]
        take_deltas(stored, start, size, deltas)
        if kind == SCE:
            select(deltas, numbers[0], rows, bits[:size])
            for m in range(models):
                own[2 * m] += dot(deltas[m, :size], deltas[m, :size])
        else:
            count_changed(deltas, numbers[0], changed[:size])
            for m in range(models):
                shared, alone = count_own(deltas[m, :size], numbers[0], changed[:size])
                own[2 * m] += shared
                own[2 * m + 1] += alone


# --- results ----------------------------------------------------------------------------------------------------------


@compiled()
def clear(row: Doubles) -> None:
    """Fill a row with zeros."""
    for i in range(row.size):
        row[i] = 0.0


@compiled(error_model="numpy")
def merge_sce_of_two(x: Doubles, y: Doubles, weights: tuple[float, float], merged: Doubles) -> None:
    """`merge_sce` of two models in one loop."""
    one, two = weights
    for i in range(merged.size):
        a, b = x[i], y[i]
        total = a + b
        left = one if a * total > 0.0 else 0.0
        right = two if b * total > 0.0 else 0.0
        share = left + right
        merged[i] = (left * a + right * b) / (share if share > 0.0 else 1.0)


@compiled(error_model="numpy")
def merge_sce(deltas: Doubles, numbers: Doubles, work: Doubles, merged: Doubles) -> None:
    """The mean of the selected deltas that agree with the sign of their sum, by their weights."""
    if len(deltas) == 2:
        merge_sce_of_two(deltas[0, : merged.size], deltas[1, : merged.size], (numbers[1], numbers[2]), merged)
        return
    total, shares = work[0, : merged.size], work[1, : merged.size]
    clear(total)
    clear(shares)
    clear(merged)
    for m in range(len(deltas)):
        own = deltas[m, : merged.size]
        for i in range(merged.size):
            total[i] += own[i]
    for m in range(len(deltas)):
        own, weight = deltas[m, : merged.size], numbers[1 + m]
        for i in range(merged.size):
            share = weight if own[i] * total[i] > 0.0 else 0.0
            shares[i] += share
            merged[i] += share * own[i]
    for i in range(merged.size):
        merged[i] = merged[i] / (shares[i] if shares[i] > 0.0 else 1.0)


@compiled(error_model="numpy")
def merge_ram(deltas: Doubles, numbers: Doubles, changed: NDArray[np.int32], merged: Doubles) -> None:
    """The mean of the deltas that count as changed; of one alone, its multiple."""
    count_changed(deltas, numbers[0], changed)
    clear(merged)
    for m in range(len(deltas)):
        own, factor = deltas[m, : merged.size], numbers[1 + m]
        for i in range(merged.size):
            term = own[i] if abs(own[i]) > numbers[0] else 0.0
            merged[i] += factor * term if changed[i] == 1 else term
    for i in range(merged.size):
        merged[i] = merged[i] / np.float64(max(changed[i], 1))


@compiled()
def merge_one(kind: int, own: Doubles, numbers: Doubles, bits: Bits, merged: Doubles) -> None:
    """NEARSWAP: the delta within its limits. ARCEE: the delta where its score is above the limit."""
    if kind == NEARSWAP:
        for i in range(merged.size):
            merged[i] = min(max(own[i], -numbers[0]), numbers[0])
        return
    limit = float_bits(np.float32(numbers[0])) if numbers[0] < np.inf else np.uint32(0x7F800000)
    for i in range(merged.size):
        merged[i] = own[i] if bits[i] > limit else 0.0


@compiled()
def add_to_base(base: Stored, merged: Doubles, out: Floats) -> None:
    """`out = base + merged`; the base itself where `merged` is 0, since -0.0 + 0.0 loses the sign."""
    for i in range(out.size):
        origin = value(base[i])
        out[i] = np.float32(np.float64(origin) + merged[i]) if merged[i] != 0.0 else origin


@compiled()
def measure_chunk(base: Stored, deltas: Doubles, sums: Doubles) -> None:
    """Add |base|^2 and <d_i, d_j> for i <= j to (1 + pairs,)."""
    sums[0] += square_of(base)
    column = 1
    for a in range(len(deltas)):
        for b in range(a, len(deltas)):
            sums[column] += dot(deltas[a, : base.size], deltas[b, : base.size])
            column += 1


@compiled()
def combine_elements(
    span: tuple[int, int],
    settings: tuple[int, Doubles, Doubles],
    stored: Stored,
    work: Scratch,
    rounded: Floats,
    out: Out,
    sums: Doubles,
) -> bool:
    """Compute elements. False if a stored value is Inf or NaN; span, stored and work as in `count_scores`.

    settings  kind, its numbers, and the divergence of each unit (ARCEE)
    rounded   (>= CHUNK,) work space
    out       (>= count,) of a dtype in STORED
    sums      (units, 2 + pairs) to fill: |base|^2, <d_i, d_j> for i <= j, and the squared norm of what is added to the
              base; if not finite, ignore all else
    """
    count, unit = span
    kind, numbers, factors = settings
    deltas, rows, bits, changed = work
    finite = True
    for low in range(0, count, unit):
        own = sums[low // unit]
        for start in range(low, min(low + unit, count), CHUNK):
            size = min(CHUNK, min(low + unit, count) - start)
            base, result = stored[0, start : start + size], rows[2, :size]
            take_deltas(stored, start, size, deltas)
            measure_chunk(base, deltas, own)
            if kind == SCE:
                select(deltas, numbers[0], rows, bits[:size])
                merge_sce(deltas, numbers, rows, result)
            elif kind == RAM:
                merge_ram(deltas, numbers, changed[:size], result)
            else:
                if kind == ARCEE:
                    importances(deltas, factors[low // unit], bits[:size])
                merge_one(kind, deltas[0, :size], numbers, bits[:size], result)
            own[-1] += dot(result, result)
            add_to_base(base, result, rounded[:size])
            finite &= store(rounded[:size], out[start : start + size])
    return finite
