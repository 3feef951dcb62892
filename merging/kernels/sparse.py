"""Kernels of the merges that choose elements: TIES, DARE, DELLA, Model Breadcrumbs.

With deltas d_m = model_m - base (fp32, element by element):

    result = base + consensus(w_1 mask_1 d_1 / q_1, ..., w_M mask_M d_M / q_M)

mask       TIES: |d| >= low, the k-th largest magnitude. Breadcrumbs: low <= |d| <= high. DARE: kept with probability p.
           DELLA: p grows linearly with the rank of |d| in its row, from density - epsilon to density + epsilon
q          the keep probability when rescaling (DARE, DELLA), else 1
consensus  the sum, or TIES' election: per element the sign of the sum; only terms of that sign stay; with `normalize`
           they are divided by the sum of the weights of their models. A zero agrees with no sign

`low` and `high` come from `top_k`; DELLA's ranks from counts of the leading bits within the row. Nothing is sorted.

Sources: TIES, arXiv 2306.01708, section 4; DARE, 2311.03099, section 3; DELLA, 2406.11617, section 3 (MAGPRUNE, by
rows); Model Breadcrumbs, 2312.06795, section 3. Deviations:
1) Elements equal to a threshold are all kept (see `top_k`).
2) DELLA: elements in one bucket (within 1/32 of each other) share their mean rank, so p is off by at most
   epsilon * (c - 1) / (row - 1) for c elements in a bucket; its mean over the row is the density. All magnitudes under
   2**-12 of the row's largest are one bucket.
3) Keep probabilities are multiples of 2**-16, the nearest except 0 (see `philox`); rescaling divides by these.
4) Signs are elected after rescaling, by the weighted sum; a negative weight flips the sign of its term.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dense import REORDER
from .dtypes import float_bits, store, value
from .native import compiled
from .number_formats import Doubles, Floats, Out, Stored
from .philox import STEPS, Words, attainable, uniforms
from .sparsity import ELECT_MEAN, HIGH, KEEP, LOW, RESCALE, SCALE, SHARE, SPREAD, SUM, WEIGHT
from .top_k import MAGNITUDE

__all__ = ["scratch", "sparse_combine"]

Draws = NDArray[np.uint16]
CHUNK = 1024  # elements: the rows of a chunk stay in the first level cache
OCTAVES = 12  # below the largest magnitude of a row, 32 buckets each
ROW_BUCKETS = OCTAVES * 32
LAST_BUCKET = np.uint32(ROW_BUCKETS - 1)
U18 = np.uint32(18)


@compiled()
def largest_bits(x: Stored, base: Stored) -> np.uint32:
    """Return the bit pattern of the largest |x - base|."""
    largest = np.uint32(0)
    for i in range(x.size):
        own = np.uint32(float_bits(value(x[i]) - value(base[i])) & MAGNITUDE)
        largest = own if own > largest else largest
    return largest


@compiled()
def rank_buckets(x: Stored, base: Stored, largest: np.uint32, out: NDArray[np.uint16]) -> None:
    """The bucket of each |x - base|; 0 holds the largest."""
    for i in range(x.size):
        below = np.uint32(np.uint32(largest - np.uint32(float_bits(value(x[i]) - value(base[i])) & MAGNITUDE)) >> U18)
        out[i] = below if below < LAST_BUCKET else LAST_BUCKET


@compiled()
def count_buckets(buckets: NDArray[np.uint16], counts: NDArray[np.int32]) -> None:
    """Elements of each bucket, as the sum of four rows: neighbours are often equal, and would wait for one counter."""
    first, second, third, fourth = counts[0], counts[1], counts[2], counts[3]
    whole = buckets.size // 4 * 4
    for i in range(0, whole, 4):
        first[buckets[i]] += 1
        second[buckets[i + 1]] += 1
        third[buckets[i + 2]] += 1
        fourth[buckets[i + 3]] += 1
    for i in range(whole, buckets.size):
        first[buckets[i]] += 1


@compiled(error_model="numpy")
def rank_row(
    x: Stored, base: Stored, setting: Doubles, buckets: NDArray[np.uint16], counts: NDArray[np.int32], chances: Floats
) -> None:
    """The buckets of one row, and DELLA's keep probability per bucket.

    The probability is density - epsilon for the smallest of the row, + epsilon for the largest; a bucket has the mean
    rank of its elements.

    buckets  (n,) of each element
    counts   (4, ROW_BUCKETS) work space
    chances  (ROW_BUCKETS,)
    """
    rank_buckets(x, base, largest_bits(x, base), buckets)
    for part in range(4):
        for bucket in range(ROW_BUCKETS):
            counts[part, bucket] = 0
    count_buckets(buckets, counts)
    first, second, third, fourth = counts[0], counts[1], counts[2], counts[3]
    for bucket in range(ROW_BUCKETS):
        first[bucket] += second[bucket] + third[bucket] + fourth[bucket]
    above = np.int32(0)  # `second`: twice the elements above the bucket plus those inside; a separate, serial loop
    for bucket in range(ROW_BUCKETS):
        inside = first[bucket]
        second[bucket] = np.int32(np.int32(above + above) + inside)
        above = np.int32(above + inside)
    keep, slope, length = setting[KEEP], setting[SPREAD] / max(x.size - 1, 1), np.int32(x.size)
    for bucket in range(ROW_BUCKETS):  # 2 epsilon (rank / (n - 1) - 1 / 2)
        chances[bucket] = attainable(keep + slope * np.int32(length - second[bucket]))


@compiled()
def trim(x: Stored, base: Stored, setting: Doubles, terms: Floats) -> None:
    """`term = weight * delta` where low <= |delta| <= high, else 0."""
    low, high, weight = np.float32(setting[LOW]), np.float32(setting[HIGH]), np.float32(setting[WEIGHT])
    for i in range(terms.size):
        delta = value(x[i]) - value(base[i])
        size = abs(delta)
        term = weight * delta if (size >= low) & (size <= high) else np.float32(0)
        terms[i] = term


@compiled(error_model="numpy")
def keep_at_random(x: Stored, base: Stored, draw: Draws, setting: Doubles, terms: Floats) -> None:
    """DARE: `term = weight * delta / p` with probability p, else 0; divided only when rescaling."""
    chance, weight = attainable(setting[KEEP]), setting[WEIGHT]
    factor = np.float32(weight / np.float64(chance) if setting[RESCALE] != 0.0 else weight)
    limit = chance * np.float32(STEPS)
    for i in range(terms.size):
        delta = value(x[i]) - value(base[i])
        term = factor * delta if np.float32(draw[i]) < limit else np.float32(0)
        terms[i] = term


@compiled()
def chances_of(buckets: NDArray[np.uint16], chances: Floats, out: Floats) -> None:
    """The keep probability of each element's bucket."""
    for i in range(out.size):
        out[i] = chances[buckets[i]]


@compiled(error_model="numpy")
def keep_by_rank(x: Stored, base: Stored, draw: Draws, chance: Floats, setting: Doubles, terms: Floats) -> None:
    """DELLA: like `keep_at_random`, with a probability for each element."""
    weight, rescale = np.float32(setting[WEIGHT]), setting[RESCALE] != 0.0
    for i in range(terms.size):
        delta = weight * (value(x[i]) - value(base[i]))
        term = delta / (chance[i] if rescale else np.float32(1))
        terms[i] = term if np.float32(draw[i]) < chance[i] * np.float32(STEPS) else np.float32(0)


@compiled()
def add_agreeing(terms: Floats, weight: np.float32, total: Floats, kept: Floats, share: Floats) -> None:
    """Where a term has the sign of the total: `kept += term; share += weight`."""
    for i in range(total.size):
        agrees = ((terms[i] > 0) & (total[i] > 0)) | ((terms[i] < 0) & (total[i] < 0))
        kept[i] += terms[i] if agrees else np.float32(0)
        share[i] += weight if agrees else np.float32(0)


@compiled(error_model="numpy")
def divide(kept: Floats, share: Floats) -> None:
    """`kept /= share` where the share is not 0."""
    for i in range(kept.size):
        kept[i] = kept[i] / (share[i] if share[i] != 0 else np.float32(1))


@compiled(fastmath=REORDER)
def square(vector: Floats) -> np.float64:
    """Return the squared norm of one chunk: summed in fp32, or in fp64 if that overflows."""
    total = np.float32(0)
    for i in range(vector.size):
        total += vector[i] * vector[i]
    if np.isfinite(total):
        return np.float64(total)
    precise = np.float64(0)
    for i in range(vector.size):
        precise += np.float64(vector[i]) * np.float64(vector[i])
    return precise


@compiled()
def add_base(base: Stored, merged: Floats, scale: np.float32, out: Floats) -> None:
    """`out = base + scale * merged`; the base itself where `merged` is 0, since -0.0 + 0.0 loses the sign."""
    for i in range(out.size):
        origin = value(base[i])
        out[i] = origin + scale * merged[i] if merged[i] != 0 else origin


@compiled()
def clear(row: Floats) -> None:
    """Fill a row with zeros."""
    for i in range(row.size):
        row[i] = np.float32(0)


@compiled(error_model="numpy")
def mean_of_two(
    first: Floats, second: Floats, weights: tuple[np.float32, np.float32], base: Stored, merged: Floats
) -> None:
    """ELECT_MEAN of two rows of terms, the most common merge, in one loop."""
    one, two = weights
    for i in range(merged.size):
        a, b = first[i], second[i]
        total = a + b
        left = ((a > 0) & (total > 0)) | ((a < 0) & (total < 0))
        right = ((b > 0) & (total > 0)) | ((b < 0) & (total < 0))
        kept = (a if left else np.float32(0)) + (b if right else np.float32(0))
        share = (one if left else np.float32(0)) + (two if right else np.float32(0))
        merged[i] = kept / (share if share != 0 else np.float32(1))


@compiled()
def elect(terms: Floats, table: Doubles, consensus: int, merged: Floats, total: Floats, share: Floats) -> None:
    """The consensus of the terms (M, >= n) of any number of models; `total` and `share` are work space."""
    clear(total)
    clear(merged)
    clear(share)
    for m in range(len(table)):
        for i in range(total.size):
            total[i] += terms[m, i]
    for m in range(len(table)):
        add_agreeing(terms[m, : total.size], np.float32(table[m, SHARE]), total, merged, share)
    if consensus == ELECT_MEAN:
        divide(merged, share)


@compiled()
def merge_chunk(
    terms: Floats, base: Stored, table: Doubles, consensus: int, space: tuple[Floats, Floats, Floats], out: Out
) -> tuple[bool, np.float64]:
    """Store the result of the terms (M, n); return whether it is finite, and its squared norm."""
    merged, total, share = space
    if consensus == ELECT_MEAN and len(table) == 2:
        mean_of_two(terms[0], terms[1], (np.float32(table[0, SHARE]), np.float32(table[1, SHARE])), base, merged)
    elif consensus != SUM:
        elect(terms, table, consensus, merged, total, share)
    else:
        clear(merged)
        for m in range(len(table)):
            for i in range(merged.size):
                merged[i] += terms[m, i]
    norm = square(merged) * table[0, SCALE] ** 2
    add_base(base, merged, np.float32(table[0, SCALE]), total)
    return store(total, out), norm


Scratch = tuple[NDArray[np.uint16], NDArray[np.int32], Floats, NDArray[np.uint32]]


def scratch(models: int, unit: int, by_rows: bool) -> Scratch:
    """Return work space for one call of the kernels below: buckets of a row, their counts and chances, and draws."""
    buckets = np.empty((models, unit if by_rows else 0), np.uint16)
    counts = np.empty((4, ROW_BUCKETS), np.int32)
    return buckets, counts, np.empty((models, ROW_BUCKETS), np.float32), np.empty(CHUNK // 2 + 7, np.uint32)


@compiled()
def sparse_combine(
    stored: Stored,
    span: tuple[int, int, int],
    settings: tuple[Doubles, Words, int],
    rows: Floats,
    work: Scratch,
    out: Out,
    squares: Doubles,
) -> bool:
    """Merge elements of one tensor. False if a stored value is Inf or NaN; a bad delta may be dropped unnoticed.

    stored     (M + 1, >= count), see `dense.gram`; row 0 is the base
    span       (count, first, unit): elements, index of the first in its tensor, and the length over which squares are
               summed: BLOCK, or the row's length if the table has a spread. `count` covers whole units, except at the
               end of the tensor
    settings   table (M, COLUMNS) fp64, from `Sparsity.table`; keys (M, 2) uint64, from `stream_key`; consensus: SUM,
               ELECT or ELECT_MEAN
    rows       (>= M + 3, >= CHUNK) fp32 work space
    work       from `scratch`
    out        (>= count,) of a dtype in STORED
    squares    (ceil(count / unit),) fp64: squared norm of the merged delta, per unit
    """
    count, first, unit = span
    table, keys, consensus = settings
    models = len(table)
    buckets, counts, chances, draws = work
    merged, total, share = rows[models], rows[models + 1], rows[models + 2]
    finite = True
    for number in range(squares.size):
        begin = number * unit
        stop = min(begin + unit, count)
        for m in range(models):
            if table[m, SPREAD] != 0.0:
                x, base = stored[m + 1, begin:stop], stored[0, begin:stop]
                rank_row(x, base, table[m], buckets[m, : stop - begin], counts, chances[m])
        squares[number] = 0.0
        for start in range(begin, stop, CHUNK):
            end = min(start + CHUNK, stop)
            size = end - start
            base = stored[0, start:end]
            for m in range(models):
                x, terms = stored[m + 1, start:end], rows[m, :size]
                if table[m, SPREAD] != 0.0:
                    draw = uniforms(keys[m], first + start, size, draws)
                    chances_of(buckets[m, start - begin : end - begin], chances[m], total[:size])
                    keep_by_rank(x, base, draw, total[:size], table[m], terms)
                elif table[m, KEEP] < 1.0:
                    draw = uniforms(keys[m], first + start, size, draws)
                    keep_at_random(x, base, draw, table[m], terms)
                else:
                    trim(x, base, table[m], terms)
            space = (merged[:size], total[:size], share[:size])
            fits, norm = merge_chunk(rows, base, table, consensus, space, out[start:end])
            finite &= fits
            squares[number] += norm
    return finite
