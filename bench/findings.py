"""What is made of the measurements of bench/science.py: each finding as a number per seed, and whether it holds. Pure.

A curve is a polyline in the plane of KL (nats per sequence, to the SFT policy) and reward: an eta line of points
(1 - eta) * theta_sft + eta * theta_merged, or the policies of an RL run at several steps. Both start at the SFT policy.

    area(curve; K)    hypervolume of the polyline over (K, reward of the SFT policy); the polyline is cut into PARTS
                      pieces a segment, since eta and the step can be chosen anywhere in between: measured points alone
                      would favour the curve that has more of them
    gap(a, b)         (area(a; K) - area(b; K)) / K up to K, the lesser of the largest KLs of both: the difference of
                      the best rewards within the same KL, averaged over KLs from 0 to K
    extent(a, b)      area(a; K) - area(b; K) up to K, the greater of the largest KLs: the difference of hypervolumes
    a.at_kls_of(b)    a read at the KLs of b's points. A chord lies below a curve that is concave, so that the one with
                      fewer corners loses: where those of two differ, a is compared with b once with the corners of
                      b, where a loses (at least), and once with those of a, where b does (at most); bounds as
                      long as reward rises with KL: trajectories that turn back can make them cross
    bend(x, f)        second divided differences ((f2 - f1) / (x2 - x1) - (f1 - f0) / (x1 - x0)) / (x2 - x0) of
                      neighbours: half the second derivative; positive where f is convex

Errors. Within a seed: the jackknife over prompts. All policies answer the same n prompts with common random numbers, so
every statistic v is computed on all prompts and n times with one prompt left out of every mean at once, and its
standard error is sqrt((n - 1) / n * sum (v_i - mean v)^2); for a difference of means that is the paired standard error.
Over S seeds the estimate is the mean, its error the larger of sd / sqrt(S), from the spread between seeds, and
sqrt(sum se_s^2) / S, from the prompts: three values alone may lie close to each other by chance.

The rule, stated before any result of this world was seen. A claim of a sign holds (yes) when the mean has that sign, is
more than LIMIT = 3 errors from zero, and every seed has that sign; it does not hold (no) when all this is so for the
other sign; else the two are not told apart. A claim of a value ("about 90 degrees") holds when the mean is within three
errors or one per cent of it, else not. Where nothing is true, a claim of a sign is found to hold in 0.1 % of cases if
seeds differ by no more than their prompts, and with six seeds in 1.5 % (Student's t, 5 degrees of freedom; with three
seeds 4.8 %) if they differ by much more. A number that is known to be too low can only show that a claim holds, one
that is too high only that it does not.

In the world before this one the limit was two errors, a trajectory had three or four corners, and that curves are
compared in two ways came after a look. All three were decided before this world was run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2.posttrain.evaluation.bootstrap import front_areas

LIMIT = 3.0  # errors
PARTS = 100  # pieces of a segment
SAME = 0.01  # of a claimed value

# Policies by the names of their stages.
START = "distilled"
ONE, TWO, FOUR, SECOND = "iteration-1/policy-1", "iteration-1/slerp", "iteration-1/slerp-4", "iteration-2/slerp"
LERP = "iteration-1/linear"
RUNS = {f"{kind}-{m}": f"{folder}/policy-{m}" for kind, folder in (("ema", "iteration-1"), ("fixed", "fixed"))
        for m in (1, 2)} | {"long": "long/policy"}  # fmt: skip
STEPS = 120  # of a run of RL
LONGER = 4  # times as many has the long one: the steps of two policies in two iterations
CORNERS = 20  # parts of a trajectory

Floats = NDArray[np.float64]


# --- one seed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; NaN where it has none, as an angle between two given models."""

    value: float
    se: float = math.nan


@dataclass(frozen=True)
class Curve:
    """Points in the order of their path: (B, P) each, a row per set of prompts; row 0 is of all prompts."""

    kl: Floats
    reward: Floats

    @property
    def end(self) -> float:
        """The largest KL, on all prompts."""
        return float(self.kl[0].max())

    def area(self, limit: float) -> Floats:
        """Hypervolume of the polyline over (limit, reward of its first point on all prompts): (B,)."""
        fine = [_refined(values) for values in (self.kl, self.reward)]
        return front_areas(fine[0], fine[1], (limit, float(self.reward[0, 0])))

    def at_kls_of(self, other: Curve) -> Curve:
        """The reward of this polyline at the KLs of another curve's points; beyond its end that of its end."""
        rows = zip(other.kl, self.kl, self.reward, strict=True)
        return Curve(other.kl, np.stack([_read(*row) for row in rows]))


def _read(at: Floats, kl: Floats, reward: Floats) -> Floats:
    order = kl.argsort(kind="stable")
    found: Floats = np.interp(at, kl[order], reward[order])
    return found


def _refined(values: Floats) -> Floats:
    """(B, P) -> (B, (P - 1) * PARTS + 1), linear between neighbours."""
    share = np.arange(PARTS) / PARTS
    left, right = values[:, :-1, None], values[:, 1:, None]
    inner = (left + (right - left) * share).reshape(len(values), -1)
    return np.concatenate([inner, values[:, -1:]], axis=1)


def gap(a: Curve, b: Curve) -> Floats:
    """Mean difference of the best rewards within the same KL: (B,)."""
    limit = min(a.end, b.end)
    return (a.area(limit) - b.area(limit)) / limit


def extent(a: Curve, b: Curve) -> Floats:
    """Difference of hypervolumes over one reference point, nats times reward: (B,)."""
    limit = max(a.end, b.end)
    return a.area(limit) - b.area(limit)


def bend(x: Sequence[float], f: Floats) -> Floats:
    """Second divided differences of f (B, P) over x (P): (B, P - 2)."""
    grid = np.asarray(x, dtype=np.float64)
    slopes = np.diff(f, axis=1) / np.diff(grid)
    bends: Floats = np.diff(slopes, axis=1) / (grid[2:] - grid[:-2])
    return bends


def left_out(values: Floats) -> Floats:
    """Means of P points over n prompts (P, n): over all, then without each prompt in turn, (1 + n, P)."""
    count = values.shape[1]
    total = values.sum(axis=1)
    rest = (total[:, None] - values).T / (count - 1)
    return np.concatenate([total[None, :] / count, rest])


def jackknifed(values: Floats) -> Estimate:
    """The estimate of row 0 with the error that the others tell: values (1 + n)."""
    rest = values[1:]
    spread = (len(rest) - 1) / len(rest) * float(((rest - rest.mean()) ** 2).sum())
    return Estimate(float(values[0]), math.sqrt(spread))


@dataclass(frozen=True)
class Seed:
    """What one seed's policies measured: a column per name.

    columns   name -> column; a place on a line is (name of its end, eta), a step of a run is what `stop` says
    kl, reward  (1 + n, columns) as `left_out` gives them
    geometry  name -> number, which needs no prompts
    """

    columns: Mapping[object, int]
    kl: Floats
    reward: Floats
    geometry: Mapping[str, float]

    def curve(self, *names: object) -> Curve:
        """A path through these points."""
        picked = [self.columns[name] for name in names]
        return Curve(self.kl[:, picked], self.reward[:, picked])

    def mean_kl(self, *names: object) -> Floats:
        """Mean KL of these policies: (1 + n)."""
        means: Floats = self.curve(*names).kl.mean(axis=1)
        return means

    def mean_reward(self, *names: object) -> Floats:
        """Mean reward of these policies: (1 + n)."""
        means: Floats = self.curve(*names).reward.mean(axis=1)
        return means

    def line(self, end: object) -> Curve:
        """The eta line to a policy."""
        return self.curve(*((end, eta) for eta in self.etas(end)))

    def etas(self, end: object) -> list[float]:
        """Where the line to a policy was measured."""
        return sorted(key[1] for key in self.columns if isinstance(key, tuple) and key[0] == end)


# --- claims and their verdict ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What the paper says of a number: its words, and a sign (of number - bound) or a value that it should have.

    only: the one verdict that a number can give which is known to be too low (yes) or too high (no)
    """

    words: str
    sign: int = 0
    bound: float = 0.0
    value: float | None = None
    only: str | None = None

    def verdict(self, found: Sequence[Estimate]) -> str:
        """yes, no, or not told apart; a dash where nothing is claimed."""
        mean, error = over_seeds(found)
        if self.value is not None:
            reach = max(LIMIT * error if math.isfinite(error) else 0.0, SAME * abs(self.value))
            return "yes" if abs(mean - self.value) <= reach else "no"
        if not self.sign:
            return "—"
        for sign, word in ((self.sign, "yes"), (-self.sign, "no")):
            every = all(sign * (one.value - self.bound) > 0 for one in found)
            if every and sign * (mean - self.bound) > LIMIT * error and self.only in (None, word):
                return word
        return "not told apart"


def above(words: str, bound: float = 0.0) -> Claim:
    """The number is larger than this."""
    return Claim(words, 1, bound)


def below(words: str, bound: float = 0.0) -> Claim:
    """The number is smaller than this."""
    return Claim(words, -1, bound)


AT_LEAST, AT_MOST = Claim("> 0", 1, only="yes"), Claim("> 0", 1, only="no")


def near(words: str, value: float) -> Claim:
    """The number is this one."""
    return Claim(words, value=value)


@dataclass(frozen=True)
class Finding:
    """A row of the table. `of`: the number of one seed; an array (1 + n) is jackknifed."""

    name: str
    claim: Claim
    of: Callable[[Seed], Floats | float]

    def estimate(self, seed: Seed) -> Estimate:
        """The number of one seed."""
        found = self.of(seed)
        return jackknifed(found) if isinstance(found, np.ndarray) else Estimate(float(found))


def over_seeds(found: Sequence[Estimate]) -> tuple[float, float]:
    """(mean, error) over seeds: the larger of the error from their spread and the error from their prompts."""
    count = len(found)
    mean = sum(one.value for one in found) / count
    errors = [math.hypot(*(one.se for one in found)) / count]
    if count > 1:
        errors.append(math.sqrt(sum((one.value - mean) ** 2 for one in found) / (count - 1) / count))
    known = [error for error in errors if math.isfinite(error)]
    return mean, max(known) if known else math.nan


# --- findings -------------------------------------------------------------------------------------------------------


def steps_of(run: str) -> int:
    """The steps of a run, by the name of its policy."""
    return STEPS * LONGER if run == RUNS["long"] else STEPS


def stops_of(run: str) -> tuple[int, ...]:
    """The steps at which a run is measured on its way."""
    every = steps_of(run) // CORNERS
    return tuple(range(every, steps_of(run), every))


def stop(run: str, step: int) -> str:
    """What a run had become by a step."""
    return f"{run} step {step}"


def path(seed: Seed, run: str) -> Curve:
    """What a run passes through from the start to its end."""
    policy = RUNS[run]
    return seed.curve(START, *(stop(policy, step) for step in stops_of(policy)), policy)


def _line_over_runs(of: Any, merge: str = TWO) -> Any:
    """The line to a merge against each of the first two runs that went into it, their mean."""
    return lambda s: (of(s.line(merge), path(s, "ema-1")) + of(s.line(merge), path(s, "ema-2"))) / 2


def _at_least(of: Any) -> Any:
    """a against b with the corners of b."""
    return lambda a, b: of(a.at_kls_of(b), b)


def _at_most(of: Any) -> Any:
    """a against b with the corners of a."""
    return lambda a, b: of(a, b.at_kls_of(a))


def _anchors(of: Any) -> Any:
    """EMA against fixed anchor at the same steps, the mean of both seeds of RL."""
    pairs = [(f"ema-{m}", f"fixed-{m}") for m in (1, 2)]
    return lambda s: sum(of(*(path(s, run) for run in pair)) for pair in pairs) / 2


def _lines(of: Any, a: str, b: str) -> Any:
    return lambda seed: of(seed.line(a), seed.line(b))


def _geometry(name: str) -> Any:
    return lambda seed: seed.geometry[name]


def _bends(which: str, of: Any) -> Any:
    """The bends of KL or reward along the line to SLERP."""
    return lambda seed: of(bend(seed.etas(TWO), getattr(seed.line(TWO), which)), axis=1)


PAIR = ("iteration-1/policy-1", "iteration-1/policy-2")
ALL = (*PAIR, "iteration-1/policy-3", "iteration-1/policy-4")
FIXED = ("fixed/policy-1", "fixed/policy-2")
MORE = "larger M is better"
FINDINGS: dict[str, list[Finding]] = {
    "Task vectors of RL runs, weights": [
        Finding("angle between task vectors, blocks, degrees", near("about 90", 90.0), _geometry("blocks")),
        Finding("the same, embedding", Claim("says nothing"), _geometry("embedding")),
        Finding("the same, final norm", Claim("says nothing"), _geometry("norm")),
        Finding("angle between full weights, largest", below("cosine > 0.999: < 2.6", 2.5626), _geometry("weights")),
        Finding("norm of SLERP over that of its task vectors", near("kept: 1", 1.0), _geometry("slerp")),
        Finding("norm of LERP over that", below("shrunk, to 0.707 at 90 degrees", 1.0), _geometry("lerp")),
    ],
    "SLERP and LERP of two policies": [
        Finding("reward, SLERP − LERP", above("> 0"), lambda s: s.mean_reward(TWO) - s.mean_reward(LERP)),
        Finding("KL, SLERP − LERP", above("> 0"), lambda s: s.mean_kl(TWO) - s.mean_kl(LERP)),
        Finding("reward, SLERP − its policies", above("> 0"), lambda s: s.mean_reward(TWO) - s.mean_reward(*PAIR)),
        Finding("reward, SLERP of four − its policies", above("> 0"),
                lambda s: s.mean_reward(FOUR) - s.mean_reward(*ALL)),
        Finding("reward at equal KL, lines, SLERP − LERP", Claim("says nothing"), _lines(gap, TWO, LERP)),
        Finding("KL, LERP − its policies", below("< 0"), lambda s: s.mean_kl(LERP) - s.mean_kl(*PAIR)),
    ],
    "The line from the SFT policy to SLERP, by eta": [
        Finding("KL: mean bend", above("convex: > 0"), _bends("kl", np.mean)),
        Finding("KL: least bend", above("convex: > 0"), _bends("kl", np.min)),
        Finding("reward: mean bend", below("concave: < 0"), _bends("reward", np.mean)),
        Finding("reward: largest bend", below("concave: < 0"), _bends("reward", np.max)),
    ],
    "LITI and the RL trajectory": [
        Finding("reward at equal KL, line of SLERP − runs, at least", AT_LEAST, _line_over_runs(_at_least(gap))),
        Finding("the same, at most", AT_MOST, _line_over_runs(_at_most(gap))),
        Finding("hypervolume, line of SLERP − runs, at least", AT_LEAST, _line_over_runs(_at_least(extent))),
        Finding("the same, at most", AT_MOST, _line_over_runs(_at_most(extent))),
        Finding("reward at equal KL, line of SLERP of four − runs, at least", AT_LEAST,
                _line_over_runs(_at_least(gap), FOUR)),
        Finding("reward at equal KL, line of policy-1 − its run, at least", AT_LEAST,
                lambda s: _at_least(gap)(s.line(ONE), path(s, "ema-1"))),
        Finding("the same, at most", AT_MOST, lambda s: _at_most(gap)(s.line(ONE), path(s, "ema-1"))),
    ],
    "EMA anchor and fixed anchor, equal beta": [
        Finding("KL at the end, EMA − fixed", above("> 0"), lambda s: s.mean_kl(*PAIR) - s.mean_kl(*FIXED)),
        Finding("reward at the end, EMA − fixed", above("> 0"), lambda s: s.mean_reward(*PAIR) - s.mean_reward(*FIXED)),
        Finding("reward at equal KL, EMA − fixed, at least", AT_LEAST, _anchors(_at_least(gap))),
        Finding("the same, at most", AT_MOST, _anchors(_at_most(gap))),
        Finding("hypervolume, EMA − fixed, at most", AT_MOST, _anchors(_at_most(extent))),
    ],
    "Iteration 2 and iteration 1": [
        Finding("reward, SLERP 2 − SLERP 1", above("> 0"), lambda s: s.mean_reward(SECOND) - s.mean_reward(TWO)),
        Finding("reward at equal KL, line 2 − line 1, at least", AT_LEAST, _lines(_at_least(gap), SECOND, TWO)),
        Finding("the same, at most", AT_MOST, _lines(_at_most(gap), SECOND, TWO)),
        Finding("hypervolume, line 2 − line 1, at most", AT_MOST, _lines(_at_most(extent), SECOND, TWO)),
    ],
    "Two iterations of two policies and one run of as many steps": [
        Finding("reward at equal KL, line 2 − long run, at least", AT_LEAST,
                lambda s: _at_least(gap)(s.line(SECOND), path(s, "long"))),
        Finding("the same, at most", AT_MOST, lambda s: _at_most(gap)(s.line(SECOND), path(s, "long"))),
        Finding("hypervolume, line 2 − long run, at least", AT_LEAST,
                lambda s: _at_least(extent)(s.line(SECOND), path(s, "long"))),
        Finding("the same, at most", AT_MOST, lambda s: _at_most(extent)(s.line(SECOND), path(s, "long"))),
    ],
    "More policies": [
        Finding("reward, M = 2 − M = 1", above(MORE), lambda s: s.mean_reward(TWO) - s.mean_reward(ONE)),
        Finding("reward at equal KL, lines, M = 2 − M = 1", above(MORE), _lines(gap, TWO, ONE)),
        Finding("hypervolume, lines, M = 2 − M = 1", above(MORE), _lines(extent, TWO, ONE)),
        Finding("reward, M = 4 − M = 2", above(MORE), lambda s: s.mean_reward(FOUR) - s.mean_reward(TWO)),
        Finding("reward at equal KL, lines, M = 4 − M = 2", above(MORE), _lines(gap, FOUR, TWO)),
        Finding("hypervolume, lines, M = 4 − M = 2", above(MORE), _lines(extent, FOUR, TWO)),
    ],
}  # fmt: skip
