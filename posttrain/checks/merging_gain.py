"""Whether the settings of `gemma2 warp` leave merging anything to gain, before a run and after its first merge.

Merging averages the policies' own noise away. Where the task vectors are less than NARROW degrees apart they mostly
share one direction, and a merge is little more than one of them. The expectation needs the noise scale N
(`noise_scale.py`), which differs by orders of magnitude between tasks: it is given, or known for the embedded networks,
or there is no expectation and no warning. A default for every model would warn falsely about real ones, whose task
vectors are about 90 degrees apart after a million completions (WARP, arXiv 2406.16768, figure 10).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.ancestry import ancestor_paths
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.schemas import TinyConfig, WarpConfig

from .noise_scale import completions_for, expected_angle, mean_norm, noise_scale_of, noise_share

if TYPE_CHECKING:
    from gemma2.merging.inspect.difference import Difference

Setting = int | tuple[int, ...]

__all__ = [
    "PolicyAngle",
    "angle_of_runs",
    "completions_of",
    "is_embedded",
    "low_gain",
    "measured_angle",
    "settings_for",
]

NARROW = 55.0  # degrees; at 54.8 merging two policies gained a third of what it did at 70 (docs/warp.md)
WIDE = 70.0  # degrees that the advice aims at
EMBEDDED = (
    1000.0  # completions; measured on the networks of `gemma2 tiny` in their default width, with a learned reward
)
HIDDEN = TinyConfig.model_fields["width"].default  # for another width N was not measured
DOCS = "docs/warp.md#when-merging-cannot-gain"


def completions_of(config: WarpConfig, iteration: int) -> int:
    """Completions that each policy of an iteration is trained on."""
    return config.steps_of(iteration) * config.prompts_per_step * config.n


def low_gain(config: WarpConfig, embedded: bool) -> str | None:
    """One line, as "what; fix", if the expected angle is narrow; None if it is not, or not known.

    embedded  the SFT policy descends from a network of `gemma2 tiny`
    """
    noise = config.noise_scale if config.noise_scale is not None else EMBEDDED if embedded else None
    if noise is None or config.policies < 2:
        return None
    iteration = max(range(1, config.iterations + 1), key=config.steps_of)
    completions = completions_of(config, iteration)
    angle = expected_angle(noise, completions)
    if angle >= NARROW:
        return None
    source = "--noise-scale" if config.noise_scale is not None else "known for models of gemma2 tiny"
    why = f"{completions:,} completions per policy at a noise scale of {noise:,.4g}, {source}"
    return (
        f"task vectors of iteration {iteration} are expected {angle:.1f} degrees apart ({why}): "
        f"{_meaning(angle, config.policies)}; {_fix(config, noise)}"
    )


def _meaning(angle: float, policies: int) -> str:
    return (
        f"the policies mostly share one direction, {noise_share(angle):.0%} of a task vector's square is noise, and a "
        f"plain average of {policies} keeps {mean_norm(angle, policies):.2f} of its norm, so merging changes little"
    )


def _fix(config: WarpConfig, noise: float) -> str:
    settings = settings_for(config, noise)
    if settings is None:
        return f"no run is short enough to change that, see {DOCS}"
    flags = " ".join(f"--{name.replace('_', '-')} {_word(value)}" for name, value in settings.items())
    angle = expected_angle(
        noise, max(completions_of(changed(config, settings), i + 1) for i in range(config.iterations))
    )
    return f"give {flags} for about {angle:.0f} degrees, see {DOCS}"


def _word(value: Setting) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def changed(config: WarpConfig, settings: Mapping[str, Setting]) -> WarpConfig:
    """The configuration with other settings."""
    return config.model_copy(update=dict(settings))


def settings_for(config: WarpConfig, noise: float) -> dict[str, Setting] | None:
    """The settings to change so that task vectors are WIDE degrees apart or more; None for lack of any.

    Fewer prompts per step come first, then two samples per prompt, the smallest group, and then fewer steps: the length
    of a run is kept where it can be. Every process of an RL run keeps an equal share of the prompts.
    """
    most = completions_for(WIDE, noise)
    processes = (config.gpus_per_policy or 1) * config.nodes
    longest = max(config.steps)
    for n in (config.n, 2):
        prompts = math.floor(most / (longest * n * processes)) * processes
        if prompts:
            return {"prompts_per_step": prompts, "n": n}
    steps = math.floor(most / (2 * processes))
    if steps < 1:
        return None
    lengths = tuple(min(length, steps) for length in config.steps)
    found: dict[str, Setting] = {"prompts_per_step": processes, "n": 2}
    found["steps"] = lengths if len(set(lengths)) > 1 else lengths[:1]
    if config.warmup_steps is not None and config.warmup_steps >= min(lengths):
        found["warmup_steps"] = min(lengths) // 10  # a warm-up as long as the run is refused
    return found


# --- the embedded networks --------------------------------------------------------------------------------------------


def is_embedded(model: Path) -> bool:
    """Whether a model descends from the student of `gemma2 tiny`, by the manifests that still exist.

    The teacher, an ancestor of what was distilled from it, has another width and says nothing.
    """
    for place in (model, *ancestor_paths(model)):
        try:
            manifest = read_manifest(place) or {}
        except InputError:
            continue
        config = manifest.get("config")
        if manifest.get("command") == "tiny" and isinstance(config, Mapping) and config.get("size") == "student":
            return bool(config.get("width", HIDDEN) == HIDDEN)
    return False


# --- after the first merge --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyAngle:
    """The angle of an iteration's task vectors in the transformer blocks, in degrees, and what it says."""

    angle: float
    completions: int

    @property
    def noise_scale(self) -> float:
        """N in completions; infinite if no common direction is seen."""
        return noise_scale_of(self.angle, self.completions)

    def as_dict(self) -> JsonObject:
        """The figures for a summary. The noise scale is None if it is not finite."""
        noise = self.noise_scale
        return {
            "angle": self.angle,
            "angle_completions": self.completions,
            "noise_scale": float(f"{noise:.4g}") if math.isfinite(noise) else None,
        }

    def statement(self) -> str:
        """One line: the angle, the noise scale, and how the next run is given it."""
        found = f"task vectors are {self.angle:.1f} degrees apart in the blocks after {self.completions:,} completions"
        if not math.isfinite(self.noise_scale):
            return f"{found} each: no common direction is seen, and the noise scale is far above that"
        return f"{found} each: a noise scale of {self.noise_scale:,.4g}; give the next run --noise-scale {self.flag}"

    @property
    def flag(self) -> str:
        """The noise scale as a value of --noise-scale."""
        return f"{float(f'{self.noise_scale:.4g}'):.16g}"

    def warning(self, config: WarpConfig) -> str | None:
        """One line, as "what; fix", if the measured angle is narrow."""
        if self.angle >= NARROW:
            return None
        return f"task vectors are {self.angle:.1f} degrees apart: {_meaning(self.angle, config.policies)}; " + _fix(
            config, self.noise_scale
        )


def angle_of_runs(a: Path, b: Path, base: Path, groups: Sequence[Difference]) -> PolicyAngle | None:
    """The angle of two models' task vectors; None unless both are RL runs from `base` with equally many completions.

    groups  the comparison of a and b by layers, with the base
    """
    counts = {_completions_from(place, base) for place in (a, b)}
    angles = [one.task_angle for one in groups if "layers." in one.group and one.task_angle is not None]
    (count, *others) = counts
    return PolicyAngle(sum(angles) / len(angles), count) if count and angles and not others else None


def _completions_from(place: Path, base: Path) -> int | None:
    """Completions of a complete RL run from `base`, by its manifest; None for a model that is not one."""
    try:
        manifest = read_manifest(place) or {}
    except InputError:  # an edited or cut manifest is not a reason to refuse a comparison of weights
        return None
    config, parents = manifest.get("config"), manifest.get("parents")
    if manifest.get("command") != "rlhf" or not isinstance(config, Mapping) or not isinstance(parents, list):
        return None
    starts = [str(one.get("path")) for one in parents if isinstance(one, Mapping) and one.get("role") == "policy"]
    counts = [value for key in ("steps", "prompts_per_step", "n") if isinstance(value := config.get(key), int)]
    if [os.path.normpath(place.resolve() / one) for one in starts] != [str(base.resolve())]:
        return None
    return math.prod(counts) if len(counts) == 3 else None


def measured_angle(config: WarpConfig, merge: JsonMapping) -> PolicyAngle | None:
    """The angle of iteration 1 from the report of its SLERP; None if its blocks have no angle.

    The mean over the blocks of the mean over pairs of policies. The embedding and the final norm are left out, as in
    the paper's figure.
    """
    angles = [
        float(group["angle"])
        for group in merge.get("groups") or ()
        if "layers." in str(group.get("group")) and isinstance(group.get("angle"), int | float)
    ]
    return PolicyAngle(sum(angles) / len(angles), completions_of(config, 1)) if angles else None
