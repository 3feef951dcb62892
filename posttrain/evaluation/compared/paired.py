"""Whether one model answers the same rows better than another: paired tests on plain arrays. Pure, numpy only.

Both models answer the same rows, so the difference is taken row by row: a hard row is hard for both. An unpaired z of
the two accuracies throws this away and needs several times as many rows.

    right or wrong   p: exact McNemar: the rows flipped one way, b, against binomial(b + c, 1/2), tail doubled
                     interval: Tango's score interval for paired proportions (Statistics in Medicine 17, 1998,
                     pages 891 to 908), which has a width also where no row flipped
    any other value  p and interval: bootstrap over the rows, basic interval; a weighted mean is a ratio of sums, both
                     resampled (perplexity per token: values per token, weights tokens)

Rows of one cluster (a subject of MMLU) are not independent. The standard error is then that of the cluster totals
(Miller 2024, arXiv 2411.00640, with the correction G / (G - 1)), the interval Student's t over G - 1, and the bootstrap
draws clusters. McNemar's p ignores clusters, so a difference is found only if p < 0.05 AND the interval excludes 0.

`rows_needed`: rows at which the observed difference would be found four times of five (power 0.8 at 0.05), with the
spread observed here. `detectable`: the difference that the rows at hand find with that power.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gemma2.posttrain.evaluation.bootstrap import CELLS, RESAMPLES, SEED, central
from gemma2.posttrain.evaluation.intervals import LEVEL, student_t

__all__ = ["Comparison", "Pairs", "compare", "mcnemar", "score_interval"]

Floats = NDArray[np.float64]
ALPHA, POWER = 1 - LEVEL, 0.8
SHOWN = 5  # rows that are named of those flipped one way
REACH = NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Pairs:
    """The rows that both models answered, and one value of each model per row.

    groups   cluster of each row; empty: every row by itself
    weights  of the rows in the mean; None: equal
    """

    ids: Sequence[str]
    ours: Floats
    theirs: Floats
    groups: Sequence[str] = ()
    weights: Floats | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        ours: Sequence[float],
        theirs: Sequence[float],
        groups: Sequence[str] = (),
        weights: Sequence[float] | None = None,
    ) -> Pairs:
        """From lists."""
        return cls(
            list(ids),
            np.asarray(ours, dtype=np.float64),
            np.asarray(theirs, dtype=np.float64),
            list(groups),
            None if weights is None else np.asarray(weights, dtype=np.float64),
        )


@dataclass(frozen=True)
class Comparison:
    """Our mean less theirs, with its 95 % interval and p.

    gained, lost    rows where our value is higher, lower; `first_gained`, `first_lost` name the first five of each
    found           whether the difference is more than noise
    rows_needed     None where the difference is found, and where it is exactly 0
    """

    n: int
    clusters: int
    ours: float
    theirs: float
    difference: float
    low: float
    high: float
    p: float
    test: str
    found: bool
    gained: int
    lost: int
    first_gained: tuple[str, ...]
    first_lost: tuple[str, ...]
    rows_needed: int | None
    detectable: float


def compare(pairs: Pairs) -> Comparison:
    """Compare two models on the same rows. Raises ValueError without rows, or if the lengths differ."""
    n = len(pairs.ids)
    if n == 0 or {len(pairs.ours), len(pairs.theirs)} != {n} or len(pairs.groups) not in (0, n):
        raise ValueError("a comparison needs rows, and one value of each model per row")
    difference = pairs.ours - pairs.theirs
    weights = np.ones(n) if pairs.weights is None else pairs.weights
    mean = float((weights * difference).sum() / weights.sum())
    clusters = _clusters(pairs.groups, n)
    several = int(clusters.max()) + 1
    gained, lost = np.flatnonzero(difference > 0), np.flatnonzero(difference < 0)
    binary = bool(np.isin(pairs.ours, (0, 1)).all() and np.isin(pairs.theirs, (0, 1)).all())
    error = _clustered_error(weights * (difference - mean), clusters) / float(weights.sum())
    if binary and pairs.weights is None:
        p, test = mcnemar(len(gained), len(lost)), "McNemar"
        if several == n:
            low, high = score_interval(len(gained), len(lost), n)
        else:
            reach = student_t((1 + LEVEL) / 2, several - 1) * error if several > 1 else math.inf
            low, high = mean - reach, mean + reach
    else:
        p, low, high = _bootstrap(weights * difference, weights, clusters, mean)
        test = "bootstrap"
    found = p < ALPHA and not low <= 0 <= high
    return Comparison(
        n=n,
        clusters=several,
        ours=float((weights * pairs.ours).sum() / weights.sum()),
        theirs=float((weights * pairs.theirs).sum() / weights.sum()),
        difference=mean,
        low=max(low, -1.0) if binary else low,
        high=min(high, 1.0) if binary else high,
        p=p,
        test=test,
        found=found,
        gained=len(gained),
        lost=len(lost),
        first_gained=tuple(pairs.ids[i] for i in gained[:SHOWN]),
        first_lost=tuple(pairs.ids[i] for i in lost[:SHOWN]),
        rows_needed=None if found or mean == 0 else max(n + 1, math.ceil(n * (REACH * error / mean) ** 2)),
        detectable=REACH * error,
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of `gained` against `lost` flips: min(1, 2 P(X <= min)), X ~ binomial(gained + lost, 1/2)."""
    flips = gained + lost
    total, term = 0, 1  # whole numbers: exact for any number of flips
    for k in range(min(gained, lost) + 1):
        total += term
        term = term * (flips - k) // (k + 1)
    return min(1.0, 2 * total / (1 << flips))


def score_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Tango's interval at 95 % of the difference of two paired proportions.

    The ends are the differences D at which the score reaches -+z:

        (b - c - n D) / sqrt(n (2 q + D (1 - D))),    q: the most likely share of the rows lost if the difference is D
    """

    def score(d: float) -> float:
        linear, constant = (2 * n - gained + lost) * d - gained - lost, -lost * d * (1 - d)
        q = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        distance = gained - lost - n * d
        return (
            distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
        )

    z, middle = NormalDist().inv_cdf((1 + LEVEL) / 2), (gained - lost) / n
    return _falls_to(score, z, -1.0, middle), _falls_to(score, -z, middle, 1.0)


def _falls_to(score: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function reaches a level, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > level else (low, middle)
    return (low + high) / 2


def _clusters(groups: Sequence[str], n: int) -> NDArray[np.int64]:
    """The number of each row's cluster, from 0."""
    if not groups:
        return np.arange(n)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[name] for name in groups])


def _clustered_error(deviations: Floats, clusters: NDArray[np.int64]) -> float:
    """Standard error of a sum of deviations from the mean whose clusters are independent."""
    totals = np.bincount(clusters, weights=deviations)
    count = len(totals)
    return math.sqrt(float((totals**2).sum()) * count / (count - 1)) if count > 1 else 0.0


def _bootstrap(sums: Floats, weights: Floats, clusters: NDArray[np.int64], mean: float) -> tuple[float, float, float]:
    """(p, low, high) of a ratio of sums over resampled clusters.

    p: share of the replicates at least as far from the mean as the mean is from 0, the observed one counted; never
    below the least p of a test that flips the signs of the clusters, 2 / 2^clusters: a few rows that agree prove
    nothing.
    """
    tops, bottoms = np.bincount(clusters, weights=sums), np.bincount(clusters, weights=weights)
    count = len(tops)
    if count == 1:
        return 1.0, -math.inf, math.inf
    generator = np.random.default_rng(SEED)
    size = max(1, CELLS // count)
    parts = []
    for start in range(0, RESAMPLES, size):
        drawn = generator.integers(count, size=(min(size, RESAMPLES - start), count))
        parts.append(tops[drawn].sum(axis=1) / bottoms[drawn].sum(axis=1))
    replicates: Floats = np.concatenate(parts)
    farther = int((np.abs(replicates - mean) >= abs(mean)).sum())
    low, high = central(2 * mean - replicates)
    return max((1 + farther) / (1 + RESAMPLES), 2.0 ** (1 - count)), low, high
