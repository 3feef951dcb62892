"""Gains of every point of a front, paired over the prompts: over the start of RL, and over RL without merging. Pure.

    over_start    point - the SFT policy
    over_single   point - the best that a single RL run has at no more KL

All points answer the same prompts with the same random numbers, so the difference is taken prompt by prompt; its
standard error is that of the mean of these differences, and its interval is Student's t over the prompts.

A single run is an RL run that does not start at a merge: one of the first iteration. Its curve joins the SFT policy,
the evaluations during training (where they were made like the points: `trajectory.py`) and the finished policy, by
straight lines. "The best at no more KL" is the highest reward among the corners with at most the KL of the point and
the places where a curve crosses this KL, a share w between two corners a and b. There

    d_i = r_i - (1 - w) r_a,i - w r_b,i  -  s (k_i - (1 - w) k_a,i - w k_b,i),    s = (r_b - r_a) / (k_b - k_a)

is averaged over the prompts i. The last term has mean 0, because w is where the curve has the KL of the point; it
carries the error of the KLs (delta method). A straight line is below a curve that bends down, by an unknown amount:
between two corners the lower end of the interval is that of the gain over the higher corner, which the curve does not
exceed while it rises. So such an interval is wide, and a gain is there only if the point beats that corner too. The
highest of several noisy rewards is too high on average, on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gemma2.core.json_files import JsonMapping, JsonObject

from .intervals import confidence_interval

__all__ = ["GAINS", "is_gain", "with_gains"]

GAINS = ("over_start", "over_single")
Values = Mapping[str, Sequence[float | None]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Corner:
    """A measured point of a run's curve."""

    label: str
    point: JsonMapping
    values: Values


@dataclass(frozen=True)
class Rival:
    """A corner (`share` 0), or the place at `share` of the way from one corner to the next."""

    start: Corner
    end: Corner
    share: float
    reward: float

    @property
    def label(self) -> str:
        """The place in words."""
        return self.start.label if self.share == 0 else f"a place between {self.start.label} and {self.end.label}"


def is_gain(key: str) -> bool:
    """Whether a column of a point is one of those that `with_gains` adds."""
    return key == "single" or any(f"_{gain}" in key for gain in GAINS)


def with_gains(points: Sequence[JsonMapping], values: Mapping[str, Values]) -> list[JsonObject]:
    """The points with the columns METRIC_over_start, METRIC_over_single, each with _se, _low and _high, and `single`.

    values: per point name, one value per prompt of each metric. `single` names what the point is compared with. A gain
    that cannot be estimated is left out: of the SFT policy over itself, of a single run over single runs.
    """
    start = next((point for point in points if point["kind"] == "sft"), None)
    if start is None:
        return [dict(point) for point in points]
    curves = list(_curves(points, values, start))
    singles = {corner.point["name"] for curve in curves for corner in curve}
    found = []
    for point in points:
        added: JsonObject = {}
        own = values.get(point["name"])
        if own is not None and point["kind"] != "sft" and start["name"] in values:
            here = Corner(_label(point), point, own)
            origin = Corner(_label(start), start, values[start["name"]])
            added |= _columns(here, Rival(origin, origin, 0.0, start["reward"]), "over_start")
            rival = _best_rival(curves, float(point["kl"]))
            if rival is not None and point["name"] not in singles and point["kind"] not in ("base", "trajectory"):
                added |= _columns(here, rival, "over_single")
                if any(is_gain(key) and "over_single" in key for key in added):
                    added["single"] = rival.label
        found.append({**point, **added})
    return found


def _curves(points: Sequence[JsonMapping], values: Mapping[str, Values], start: JsonMapping) -> Iterator[list[Corner]]:
    """The curve of every single run: the SFT policy, its evaluations in the order of their steps, the policy."""
    runs = [point for point in points if point["kind"] == "policy" and point["name"] in values]
    first = min((point["iteration"] for point in runs if point.get("iteration")), default=None)
    for run in runs:
        if run.get("iteration") != first or start["name"] not in values:
            continue
        steps = [p for p in points if p["kind"] == "trajectory" and p.get("run") == run["name"] and p["name"] in values]
        corners = [start, *sorted(steps, key=lambda point: point["step"]), run]
        yield [Corner(_label(corner), corner, values[corner["name"]]) for corner in corners]


def _best_rival(curves: Sequence[Sequence[Corner]], kl: float) -> Rival | None:
    """The highest reward of the curves at no more KL; of equal ones the first."""
    rivals = []
    for curve in curves:
        for corner in curve:
            if corner.point["kl"] <= kl:
                rivals.append(Rival(corner, corner, 0.0, corner.point["reward"]))
        for a, b in pairwise(curve):
            low, high = sorted((a.point["kl"], b.point["kl"]))
            if low < kl < high:
                share = (kl - a.point["kl"]) / (b.point["kl"] - a.point["kl"])
                rivals.append(Rival(a, b, share, (1 - share) * a.point["reward"] + share * b.point["reward"]))
    return max(rivals, key=lambda rival: rival.reward, default=None)


def _columns(here: Corner, rival: Rival, name: str) -> JsonObject:
    """The gain in every metric that all three points have, as columns."""
    metrics = [metric for metric in here.values if metric != "kl"]
    columns: JsonObject = {}
    for metric in metrics:
        if metric not in rival.start.values or metric not in rival.end.values:
            continue
        differences = _differences(here, rival, metric)
        count = len(differences)
        if count < 2 or not np.any(differences):
            continue  # one prompt, or the same model
        mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(count)
        low, high = confidence_interval(mean, error, count) or (None, None)
        if rival.share and low is not None:
            low = min(low, *_low_ends(here, rival, metric))
        key = f"{metric}_{name}"
        columns |= {key: mean, f"{key}_se": error, f"{key}_low": low, f"{key}_high": high}
    return columns


def _low_ends(here: Corner, rival: Rival, metric: str) -> Iterator[float]:
    """The lower end of the gain over the higher of the two corners."""
    corner = max((rival.start, rival.end), key=lambda corner: float(np.nanmean(_array(corner.values[metric]))))
    differences = _differences(here, Rival(corner, corner, 0.0, 0.0), metric)
    ends = confidence_interval(
        float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences)), len(differences)
    )
    yield from ends[:1] if ends else ()


def _differences(here: Corner, rival: Rival, metric: str) -> Floats:
    """One difference per prompt on which all have a value."""
    own, a, b = (_array(corner.values[metric]) for corner in (here, rival.start, rival.end))
    share = rival.share
    found: Floats = own - (1 - share) * a - share * b
    if share:
        kl, kl_a, kl_b = (_array(corner.values["kl"]) for corner in (here, rival.start, rival.end))
        slope = (np.nanmean(b) - np.nanmean(a)) / (rival.end.point["kl"] - rival.start.point["kl"])
        found = found - slope * (kl - (1 - share) * kl_a - share * kl_b)
    return found[~np.isnan(found)]


def _label(point: JsonMapping) -> str:
    return str(point.get("label") or point["name"])


def _array(values: Sequence[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
