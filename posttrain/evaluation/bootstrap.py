"""The confidence interval of a hypervolume: a bootstrap over prompts, paired across the policies.

Every policy answers the same prompts with the same random numbers, so one resample of prompts serves all points at
once: a hard prompt is hard for every policy, and its effect cancels in a difference of fronts. The reference
point stays where it is.

A front takes the best of noisy points, so the replicates of its area are above the area on average. The interval is the
basic one (Davison and Hinkley 1997, section 5.2.1), which mirrors the replicates at the estimate,

    [2 v - q(97.5 %), 2 v - q(2.5 %)],

and so counts that excess against the estimate instead of for it. Areas are not negative: mirrored ones are cut at 0.

The best of several noisy points within a KL is too good on average in the same way; `chosen_elsewhere` gives its reward
on prompts that had no part in the choice (out-of-bag: Efron and Tibshirani 1997, doi:10.1080/01621459.1997.10474007).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .intervals import LEVEL

__all__ = [
    "CELLS",
    "RESAMPLES",
    "SEED",
    "Answers",
    "central",
    "chosen_elsewhere",
    "front_areas",
    "interval",
    "mirrored",
    "resampled_areas",
]

RESAMPLES, SEED = 2000, 0
CELLS = 4_000_000  # prompts x resamples whose counts are in memory at once

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """KL and reward of P points on the same n prompts: (P, n) each, NaN where a score had no opinion."""

    kl: Floats
    reward: Floats

    @classmethod
    def of(cls, kl: Sequence[Sequence[float]], reward: Sequence[Sequence[float]]) -> Answers:
        """From one list per point."""
        return cls(np.array(kl, dtype=np.float64), np.array(reward, dtype=np.float64))


def front_areas(kl: Floats, reward: Floats, reference: tuple[float, float]) -> Floats:
    """Hypervolume of each row's points, (B,): `front.hypervolume` for B sets of P points at once.

    kl, reward: (B, P). reference: (largest KL, least reward).
    """
    limit, floor = reference
    order = np.argsort(kl, axis=1, kind="stable")
    kl = np.minimum(np.take_along_axis(kl, order, axis=1), limit)
    height = np.maximum(np.maximum.accumulate(np.take_along_axis(reward, order, axis=1), axis=1), floor)
    ends = np.concatenate([kl[:, 1:], np.full((len(kl), 1), limit)], axis=1)
    areas: Floats = ((ends - kl) * (height - floor)).sum(axis=1)
    return areas


def resampled_areas(
    answers: Answers, groups: Sequence[Sequence[int]], reference: tuple[float, float], resamples: int = RESAMPLES
) -> Floats:
    """Hypervolumes of several sets of points over the same resamples of prompts: (groups, resamples).

    groups: indices of the points of each set.
    """
    parts = []
    for times in _resamples(answers.kl.shape[1], resamples):
        means = _means(answers.kl, times), _means(answers.reward, times)
        parts.append(np.stack([front_areas(means[0][:, g], means[1][:, g], reference) for g in map(list, groups)]))
    return np.concatenate(parts, axis=1)


def _resamples(count: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often each of `count` prompts is drawn, (B, n), in parts that fit into memory; the same at every call."""
    generator = np.random.default_rng(SEED)
    size = max(1, CELLS // count)
    for start in range(0, resamples, size):
        yield generator.multinomial(count, np.full(count, 1 / count), size=min(size, resamples - start))


def _means(values: Floats, times: NDArray[np.int64]) -> Floats:
    """Mean of every point over each resample, (B, P), from (P, n) values and how often (B, n) each prompt is drawn.

    A resample in which a score has no opinion at all has the mean over all prompts.
    """
    known = ~np.isnan(values)
    number = times @ known.T.astype(np.float64)
    filled = np.where(known, values, 0.0)
    overall = filled.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    means: Floats = np.where(number > 0, (times @ filled.T) / np.maximum(number, 1.0), overall[None, :])
    return means


def mirrored(estimate: float, replicates: Floats) -> Floats:
    """The replicates of an area mirrored at its estimate, and cut at 0."""
    found: Floats = np.maximum(0.0, 2 * estimate - replicates)
    return found


def interval(estimate: float, replicates: Floats) -> tuple[float, float]:
    """The basic bootstrap interval at 95 % of an area, or of a gain in area."""
    return central(mirrored(estimate, replicates))


def central(values: Floats) -> tuple[float, float]:
    """The ends of the central 95 % of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def chosen_elsewhere(answers: Answers, limits: Sequence[float], resamples: int = RESAMPLES) -> list[float | None]:
    """For each KL limit, the reward of the best point within it on prompts that did not choose it.

    In each resample the best point is chosen anew, by the resampled means, and its reward is the mean over the prompts
    that the resample left out; the result is the mean over resamples. The chosen point is not the luckiest on these
    prompts, so the figure has no excess from the choice; it is a little low, since a resample chooses by 63 % of the
    prompts. None without a resample that has a point within the limit and a prompt left out.
    """
    count = answers.kl.shape[1]
    totals, numbers = np.zeros(len(limits)), np.zeros(len(limits))
    for times in _resamples(count, resamples):
        kl, reward = _means(answers.kl, times), _means(answers.reward, times)
        left_out = (times == 0).astype(np.int64)
        elsewhere = _means(answers.reward, left_out)
        some = left_out.any(axis=1)
        for i, limit in enumerate(limits):
            within = kl <= limit
            best = np.where(within, reward, -np.inf).argmax(axis=1)
            used = some & within.any(axis=1)
            totals[i] += elsewhere[np.arange(len(best)), best][used].sum()
            numbers[i] += used.sum()
    return [float(total / number) if number else None for total, number in zip(totals, numbers, strict=True)]
