"""The area of a front: the point that bounds it, its interval, and what a front adds to earlier ones. Torch-free.

The reference point is (largest KL, least reward). By default it is taken from the figures of the points alone: the
largest KL of a point with more reward than the SFT policy, models from before RL left out, and the reward of the SFT
policy. So it includes every point that dominates any area, and no policy that RL or SFT left behind. `--reference` sets
it; fronts that take over points of such a front keep its reference.

An area is the sum of what earlier fronts have and what this one adds, neither of which is negative. With v the estimate
and v* a replicate (`bootstrap.py`), both parts are mirrored in the same resample,

    area_b = max(0, 2 before - before*_b) + max(0, 2 gain - gain*_b),

so that no resample has a gain above its area, and the ends of the interval of the area are not below those of the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.progress import Progress

from .bootstrap import RESAMPLES, Answers, central, interval, mirrored, resampled_areas
from .front import hypervolume

__all__ = ["Reference", "area_columns", "gain_columns", "given_reference", "note_other_references", "reference_of"]

RULE, OPTION, TAKEN_OVER = "points", "--reference", "--fronts"  # where a reference point is from


@dataclass(frozen=True)
class Reference:
    """The point that bounds an area. `point`: name of the point that has the KL, where the points decide."""

    kl: float
    reward: float
    source: str
    point: str | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """(largest KL, least reward)."""
        return self.kl, self.reward

    @property
    def columns(self) -> JsonObject:
        """The entries of front.json."""
        return {
            "reference": {"kl": self.kl, "reward": self.reward},
            "reference_from": self.source,
            "reference_point": self.point,
        }


def given_reference(values: Sequence[float], fronts: Mapping[Path, JsonMapping]) -> Reference | None:
    """The reference point of `--reference`, else the one that earlier fronts were given; None if points decide.

    Raises InputError for earlier fronts with different given ones.
    """
    if values:
        return Reference(values[0], values[1], OPTION)
    found = {
        (float(front["reference"]["kl"]), float(front["reference"]["reward"])): path
        for path, front in fronts.items()
        if front.get("reference_from") in (OPTION, TAKEN_OVER)
    }
    if len(found) > 1:
        each = " and ".join(f"{path} by KL {kl:g} and reward {reward:g}" for (kl, reward), path in found.items())
        raise InputError(f"--fronts are bounded by different reference points: {each}", "give --reference KL,REWARD")
    return next((Reference(*ends, TAKEN_OVER) for ends in found), None)


def reference_of(points: Sequence[JsonMapping]) -> Reference:
    """The reference point that the figures of the points give."""
    sft = next(point for point in points if point["kind"] == "sft")
    above = [point for point in points if point["kind"] != "base" and point["reward"] > sft["reward"]]
    farthest = max(above, key=lambda point: point["kl"], default=sft)
    return Reference(farthest["kl"], sft["reward"], RULE, farthest["name"])


def note_other_references(own: Reference, fronts: Mapping[Path, JsonMapping], progress: Progress) -> None:
    """Say which earlier areas cannot be compared with that of this front, since another point bounds them."""
    for path, front in fronts.items():
        theirs = front.get("reference") or {}
        if (theirs.get("kl"), theirs.get("reward")) != own.ends:
            other = f"KL {theirs.get('kl', 0):.3g} and reward {theirs.get('reward', 0):.3g}"
            progress.note(
                f"the area is bounded by KL {own.kl:.3g} and reward {own.reward:.3g}, that of {path} by {other}: "
                "compare the gain, not the areas"
            )


def area_columns(points: Sequence[JsonMapping], answers: Answers, reference: Reference, moved: bool) -> JsonObject:
    """`hypervolume` with its interval. moved: whether any policy differs from the start; else there is no area."""
    area = hypervolume(points, reference.ends) if moved else None
    if area is None or answers.kl.shape[1] < 2:
        return {"hypervolume": area, **_ends("hypervolume", None), "bootstrap_resamples": 0}
    (replicates,) = resampled_areas(answers, [range(len(points))], reference.ends)
    ends = interval(area, replicates)
    return {"hypervolume": area, **_ends("hypervolume", ends), "bootstrap_resamples": RESAMPLES}


def gain_columns(
    points: Sequence[JsonMapping], answers: Answers, reference: Reference, moved: bool, taken: Sequence[bool]
) -> JsonObject:
    """The area before, the gain, and the area as their sum, each with its interval; `improved`.

    taken: per point, whether it is one of an earlier front.
    """
    names = "hypervolume_before", "hypervolume_gain", "hypervolume"
    earlier = [i for i, before in enumerate(taken) if before]
    if not moved:
        return {key: None for name in names for key in (name, *_ends(name, None))} | {"improved": False}
    area = hypervolume(points, reference.ends)
    before = hypervolume([points[i] for i in earlier], reference.ends)
    columns: JsonObject = {"hypervolume_before": before, "hypervolume_gain": area - before, "hypervolume": area}
    if answers.kl.shape[1] < 2:
        return columns | {key: None for name in names for key in _ends(name, None)} | {"improved": False}
    whole, part = resampled_areas(answers, [range(len(points)), earlier], reference.ends)
    parts = mirrored(before, part), mirrored(area - before, whole - part)
    for name, replicates in zip(names, (*parts, parts[0] + parts[1]), strict=True):
        columns |= _ends(name, central(replicates))
    return columns | {"improved": columns["hypervolume_gain_low"] > 0}


def _ends(name: str, ends: tuple[float, float] | None) -> JsonObject:
    low, high = ends or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
