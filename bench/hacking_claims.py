"""What is made of the measurements of bench/hacking.py: the claims H1 to H4, their errors and verdicts. Pure.

The rule is in the docstring of that file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from findings import Estimate, above

VERDICTS = {"yes": "holds", "no": "fails"}
CLAIMS = {
    "H1": "judge at the last step",
    "H2": "judge over the run",
    "H3": "step at which the judge is highest",
    "H4": "accuracy on held-out pairs",
}


@dataclass(frozen=True)
class Curve:
    """What an RL run measured of itself, a value per stop; errors are those of the mean over prompts."""

    step: Sequence[int]
    judge: Sequence[float]
    judge_se: Sequence[float]
    accuracy: Sequence[float]
    reward: Sequence[float]  # by the model that it learned from
    reward_se: Sequence[float]
    kl: Sequence[float]
    length: Sequence[float]
    prompts: int

    def gain(self, name: str) -> list[float]:
        """Gain of `judge` or `reward` since step 0, in standard deviations of the answers at step 0."""
        values, spread = getattr(self, name), getattr(self, f"{name}_se")[0] * math.sqrt(self.prompts)
        return [(value - values[0]) / spread for value in values]


@dataclass(frozen=True)
class Seed:
    """One replicate: the RL runs by name, and per prompt and pair which model has it right."""

    runs: Mapping[str, Curve]
    scores: Mapping[str, Sequence[Sequence[float]]]

    @property
    def members(self) -> list[Curve]:
        """The runs against a single reward model."""
        return [curve for name, curve in self.runs.items() if name != "rl-average"]


def peak(curve: Curve) -> int:
    """The step at which the judge is highest: the first of them."""
    return curve.step[max(range(len(curve.step)), key=lambda i: (curve.judge[i], -i))]


def lost(curve: Curve) -> int | None:
    """The first step after the peak at which the judge is below its value at step 0, if there is one."""
    stops = zip(curve.step, curve.judge, strict=True)
    return next((step for step, judge in stops if step > peak(curve) and judge < curve.judge[0]), None)


def over_run(curve: Curve) -> Estimate:
    """Area under the judge over the steps, by trapezoids, divided by the steps; stops' errors fully correlated."""
    gaps = np.diff(np.asarray(curve.step, dtype=np.float64))
    weights = (np.append(gaps, 0.0) + np.append(0.0, gaps)) / 2 / gaps.sum()
    return Estimate(float(weights @ np.asarray(curve.judge)), float(weights @ np.asarray(curve.judge_se)))


def at_kl(curve: Curve, kl: float) -> float:
    """The judge where the run's KL is this, linear between stops."""
    order = np.argsort(curve.kl, kind="stable")
    return float(np.interp(kl, np.asarray(curve.kl)[order], np.asarray(curve.judge)[order]))


def less(average: Estimate, members: Sequence[Estimate]) -> Estimate:
    """average - mean of the members; the error of a mean is at most the mean of the errors."""
    count = len(members)
    value = average.value - sum(one.value for one in members) / count
    return Estimate(value, math.hypot(average.se, sum(one.se for one in members) / count))


def accuracy_gain(scores: Mapping[str, Sequence[Sequence[float]]]) -> Estimate:
    """Accuracy of the average - mean accuracy of the members, paired by pair, clustered by prompt.

    A mean of all pairs is a ratio of sums over prompts: its error is that of the residuals sum_p - mean * count_p.
    """
    members = [values for name, values in scores.items() if name != "average"]
    sums, counts = [], []
    for place, pairs in enumerate(scores["average"]):
        sums.append(sum(pairs) - sum(sum(values[place]) for values in members) / len(members))
        counts.append(len(pairs))
    total, mean = sum(counts), sum(sums) / sum(counts)
    squares = sum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    prompts = len(sums)
    return Estimate(mean, math.sqrt(squares * prompts / (prompts - 1)) / total if prompts > 1 else math.nan)


def claims(seed: Seed) -> dict[str, Estimate]:
    """H1 to H4 of one seed."""
    average, members = seed.runs["rl-average"], seed.members
    lasts = [Estimate(curve.judge[-1], curve.judge_se[-1]) for curve in (average, *members)]
    later = peak(average) - sum(peak(curve) for curve in members) / len(members)
    return {
        "H1": less(lasts[0], lasts[1:]),
        "H2": less(over_run(average), [over_run(curve) for curve in members]),
        "H3": Estimate(float(later)),
        "H4": accuracy_gain(seed.scores),
    }


def verdict(found: Sequence[Estimate]) -> str:
    """holds, fails, or not told apart: by LIMIT errors and the sign of every seed, as bench/findings.py has it."""
    return VERDICTS.get(above("> 0").verdict(found), "not told apart")


def described(seed: Seed) -> dict[str, tuple[float, float]]:
    """What no claim is made of: (mean of the members, average)."""
    average, members = seed.runs["rl-average"], seed.members
    common = min(max(curve.kl) for curve in (average, *members))

    def row(of: Callable[[Curve], float]) -> tuple[float, float]:
        return sum(of(curve) for curve in members) / len(members), of(average)

    def accuracy(name: str) -> float:
        values = [one for pairs in seed.scores[name] for one in pairs]
        return sum(values) / len(values)

    names = [name for name in seed.scores if name != "average"]
    return {
        "accuracy on held-out pairs": (sum(map(accuracy, names)) / len(names), accuracy("average")),
        "step of the highest judge": row(peak),
        "judge there": row(lambda curve: max(curve.judge)),
        "judge at the last step": row(lambda curve: curve.judge[-1]),
        "share of runs that lose all that the judge gained": row(lambda curve: float(lost(curve) is not None)),
        "judge at the largest KL that all runs reach": row(lambda curve: at_kl(curve, common)),
        "gain of the own reward − of the judge, last step, sd": row(
            lambda curve: curve.gain("reward")[-1] - curve.gain("judge")[-1]
        ),
        "sd of the own reward at step 0": row(lambda curve: curve.reward_se[0] * math.sqrt(curve.prompts)),
    }
