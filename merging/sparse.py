"""Merges that choose elements: TIES, DARE, DELLA, Model Breadcrumbs. The kernels behind them, and their thresholds.

With deltas d_m = model_m - base (fp32, element by element):

    result = base + consensus(w_1 mask_1 d_1 / q_1, ..., w_M mask_M d_M / q_M)

mask       TIES: |d| >= low, the k-th largest magnitude. Breadcrumbs: low <= |d| <= high. DARE: kept with probability p.
           DELLA: p grows linearly with the rank of |d| in its row, from density - epsilon to density + epsilon
q          the keep probability when rescaling (DARE, DELLA), else 1
consensus  the sum, or TIES' election: per element the sign of the sum; only terms of that sign stay; with `normalize`
           they are divided by the sum of the weights of the models they come from. A zero agrees with nothing

`low` and `high` come from `selection`; DELLA's ranks from counts of the leading bits within the row. Nothing is sorted.

Sources: TIES, arXiv 2306.01708, section 4; DARE, 2311.03099, section 3; DELLA, 2406.11617, section 3 (MAGPRUNE, by
rows); Model Breadcrumbs, 2312.06795, section 3. Deviations:
1) Elements equal to a threshold are all kept (see `selection`).
2) DELLA: elements in one bucket (within 1/64 of each other) share their mean rank, so p is off by at most
   epsilon * (c - 1) / (row - 1) for c elements in a bucket; its mean over the row is the density. All magnitudes under
   2**-16 of the row's largest are one bucket.
3) Signs are elected after rescaling, by the weighted sum; a negative weight turns the sign of its term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import ITEMS, Bytes, Doubles, Floats, compiled, narrow, value
from .kernels import BLOCK, REORDER
from .randomness import Words, uniforms
from .selection import INFINITE, MAGNITUDE, Counts, largest_bits, subtract

__all__ = ["COLUMNS", "ELECT", "ELECT_MEAN", "SUM", "Sparsity", "sparse_combine"]

SUM, ELECT, ELECT_MEAN = 0, 1, 2
WEIGHT, SHARE, LOW, HIGH, KEEP, SPREAD, RESCALE = range(7)  # columns of the table
COLUMNS = 7
OCTAVES = 16  # below the largest magnitude of a row, 64 buckets each
ROW_BUCKETS = OCTAVES * 64
LAST_BUCKET = np.uint32(ROW_BUCKETS - 1)
U17 = np.uint32(17)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What one tensor's merge does, in plain numbers: one per model in each tuple.

    weights    of the task vectors
    low, high  magnitudes that are kept, both included; () keeps all
    keep       DARE, DELLA: mean keep probability; () keeps all
    spread     DELLA: epsilon, half of the range of the keep probability; () is 0
    rescale    divide what is kept by its keep probability
    elect      take only terms of the elected sign
    normalize  divide by the sum of the weights: of all models, or with `elect` of those that take part
    scale      of the merged task vector (lambda)
    """

    weights: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    keep: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    rescale: bool = True
    elect: bool = False
    normalize: bool = False
    scale: float = 1.0

    @property
    def consensus(self) -> int:
        """SUM, ELECT or ELECT_MEAN."""
        return (ELECT_MEAN if self.normalize else ELECT) if self.elect else SUM

    @property
    def by_rows(self) -> bool:
        """Whether ranks within rows are needed: the unit of `sparse_combine` is then the row."""
        return any(self.spread)

    def table(self) -> Doubles:
        """For `sparse_combine`, (M, COLUMNS) fp64."""
        table = np.zeros((len(self.weights), COLUMNS))
        share = np.array(self.weights)
        table[:, WEIGHT] = self.scale * share
        if self.normalize and not self.elect:
            table[:, WEIGHT] /= share.sum()
        table[:, SHARE] = share
        table[:, LOW] = self.low or 0.0
        table[:, HIGH] = self.high or np.inf
        table[:, KEEP] = self.keep or 1.0
        table[:, SPREAD] = self.spread or 0.0
        table[:, RESCALE] = self.rescale
        return table


@compiled()
def rank_buckets(delta: Floats, largest: Any, out: NDArray[np.uint32]) -> None:
    """The bucket of each |delta|; 0 holds the largest. `out` is other memory, or the loop would not be vectorised."""
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        below = np.uint32(np.uint32(largest - np.uint32(bits[i] & MAGNITUDE)) >> U17)
        out[i] = below if below < LAST_BUCKET else LAST_BUCKET


@compiled()
def mean_ranks(counts: Counts, length: int, ranks: Floats) -> None:
    """Mean rank of each bucket's elements: 0 is the smallest of the row, 1 the largest; 1/2 for one alone."""
    share = 1.0 / max(length - 1, 1)
    above = np.int64(0)
    for bucket in range(counts.size):
        inside = counts[bucket]
        ranks[bucket] = 1.0 - (above + 0.5 * (inside - 1)) * share
        above += inside
    if length == 1:
        ranks[:] = 0.5


@compiled()
def rank_row(x: Any, base: Any, space: Floats, ranks: Floats) -> Any:
    """Mean ranks of the buckets (ROW_BUCKETS,) of the row `x - base`, and the bits of its largest magnitude.

    `space` is (2, BLOCK).
    """
    largest = np.uint32(0)
    for start in range(0, x.size, BLOCK):
        end = min(start + BLOCK, x.size)
        subtract(x[start:end], base[start:end], space[0, : end - start])
        largest = max(largest, largest_bits(space[0, : end - start]))
    counts = np.zeros(ROW_BUCKETS, np.int64)
    buckets = space[1].view(np.uint32)
    for start in range(0, x.size, BLOCK):
        end = min(start + BLOCK, x.size)
        subtract(x[start:end], base[start:end], space[0, : end - start])
        rank_buckets(space[0, : end - start], largest, buckets[: end - start])
        for i in range(end - start):
            counts[buckets[i]] += 1
    mean_ranks(counts, x.size, ranks)
    return largest


@compiled()
def add_trimmed(delta: Floats, setting: Doubles, total: Floats) -> None:
    """`delta = weight * delta` where low <= |delta| <= high, else 0; `total += delta`."""
    low, high, weight = np.float32(setting[LOW]), np.float32(setting[HIGH]), np.float32(setting[WEIGHT])
    for i in range(total.size):
        size = abs(delta[i])
        term = weight * delta[i] if (size >= low) & (size <= high) else np.float32(0)
        delta[i] = term
        total[i] += term


@compiled(error_model="numpy")
def add_at_random(delta: Floats, draw: Floats, setting: Doubles, total: Floats) -> None:
    """DARE: `delta = weight * delta / p` with probability p, else 0, the division where asked; `total += delta`."""
    chance, weight = np.float32(setting[KEEP]), setting[WEIGHT]
    factor = np.float32(weight / setting[KEEP] if setting[RESCALE] != 0.0 else weight)
    for i in range(total.size):
        term = factor * delta[i] if draw[i] < chance else np.float32(0)
        delta[i] = term
        total[i] += term


@compiled(error_model="numpy")
def add_by_rank(delta: Floats, draw: Floats, setting: Doubles, chance: Floats, total: Floats) -> None:
    """DELLA: as `add_at_random`, with the probability of each element in `chance`."""
    weight = np.float32(setting[WEIGHT])
    if setting[RESCALE] == 0.0:
        for i in range(total.size):
            term = weight * delta[i] if draw[i] < chance[i] else np.float32(0)
            delta[i] = term
            total[i] += term
        return
    for i in range(total.size):
        term = weight * delta[i] / chance[i] if draw[i] < chance[i] else np.float32(0)
        delta[i] = term
        total[i] += term


@compiled()
def chances_of(delta: Floats, setting: Doubles, largest: Any, ranks: Floats, out: Floats) -> None:
    """DELLA's keep probability of each element: density - epsilon for the smallest of the row, + epsilon at the top."""
    floor, slope = np.float32(setting[KEEP] - setting[SPREAD]), np.float32(2.0 * setting[SPREAD])
    buckets = out.view(np.uint32)
    rank_buckets(delta, largest, buckets)
    for i in range(out.size):
        out[i] = floor + slope * ranks[buckets[i]]


@compiled()
def add_agreeing(delta: Floats, weight: Any, total: Floats, kept: Floats, share: Floats) -> None:
    """Where a term has the sign of the total: `kept += delta; share += weight`."""
    for i in range(total.size):
        agrees = ((delta[i] > 0) & (total[i] > 0)) | ((delta[i] < 0) & (total[i] < 0))
        kept[i] += delta[i] if agrees else np.float32(0)
        share[i] += weight if agrees else np.float32(0)


@compiled(error_model="numpy")
def divide(kept: Floats, share: Floats) -> None:
    """`kept /= share`, where anything takes part."""
    for i in range(kept.size):
        kept[i] = kept[i] / (share[i] if share[i] != 0 else np.float32(1))


@compiled(fastmath=REORDER)
def square(vector: Floats) -> Any:
    """Squared norm of one block: fp32, or fp64 where that overflows."""
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
def add_base(base: Any, merged: Floats, out: Floats) -> None:
    """Their sum; the base itself where nothing is added, since -0.0 + 0.0 loses the sign."""
    for i in range(out.size):
        origin = value(base[i])
        out[i] = origin + merged[i] if merged[i] != 0 else origin


@compiled()
def sparse_combine(
    stored: Any,
    span: Counts,
    table: Doubles,
    keys: Words,
    consensus: int,
    rows: Floats,
    out: Bytes,
    out_kind: int,
    squares: Doubles,
) -> bool:
    """Merge elements of one tensor. False when a delta or a stored value is Inf or NaN.

    stored     (M + 1, >= count) as `kernels.gram` wants it, row 0 the base
    span       (count, first, unit): elements, index of the first in its tensor, and the length over which squares are
               summed: BLOCK, or the row's length where the table has a spread. `count` covers whole units, but for the
               end of the tensor
    table      (M, COLUMNS) fp64, from `Sparsity.table`
    keys       (M, 2) uint64, from `stream_key`
    consensus  SUM, ELECT or ELECT_MEAN
    rows       (>= M + 3, BLOCK) fp32 work space
    out        (>= count * item,) uint8, encoded as `out_kind`
    squares    (ceil(count / unit),) fp64: squared norm of the merged delta, per unit
    """
    count, unit, models = span[0], span[2], table.shape[0]
    ranks = np.empty((models, ROW_BUCKETS), np.float32)
    largest = np.zeros(models, np.uint32)
    draws = np.empty(BLOCK + 6, np.float32)
    item = ITEMS[out_kind]
    finite = True
    for number in range(squares.size):
        begin = number * unit
        stop = min(begin + unit, count)
        for m in range(models):
            if table[m, SPREAD] != 0.0:
                largest[m] = rank_row(stored[m + 1, begin:stop], stored[0, begin:stop], rows[:2], ranks[m])
        squares[number] = 0.0
        for start in range(begin, stop, BLOCK):
            end = min(start + BLOCK, stop)
            size = end - start
            base = stored[0, start:end]
            total, kept, share = rows[models, :size], rows[models + 1, :size], rows[models + 2, :size]
            total[:] = np.float32(0)
            for m in range(models):
                delta = rows[m, :size]
                subtract(stored[m + 1, start:end], base, delta)
                finite &= largest_bits(delta) < INFINITE
                if table[m, KEEP] >= 1.0 and table[m, SPREAD] == 0.0:
                    add_trimmed(delta, table[m], total)
                    continue
                draw = uniforms(keys[m], span[1] + start, size, draws)
                if table[m, SPREAD] == 0.0:
                    add_at_random(delta, draw, table[m], total)
                else:
                    chances_of(delta, table[m], largest[m], ranks[m], kept)
                    add_by_rank(delta, draw, table[m], kept, total)
            merged = total
            if consensus != SUM:
                merged = kept
                kept[:] = np.float32(0)
                share[:] = np.float32(0)
                for m in range(models):
                    add_agreeing(rows[m, :size], np.float32(table[m, SHARE]), total, kept, share)
                if consensus == ELECT_MEAN:
                    divide(kept, share)
            squares[number] += square(merged)
            add_base(base, merged, share)
            finite &= narrow(share, out_kind, out[start * item : end * item])
    return finite
