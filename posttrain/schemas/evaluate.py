"""`gemma2 eval`, `gemma2 pareto` and `gemma2 pick`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from gemma2.core.json_files import JsonMapping, JsonObject

from .config import Config, Need
from .fields import Bounds, CallFields, Data, LaunchFields, Model, Pick, RowFields, SamplingFields, Seed
from .rlhf import RewardFields


class DistributionConfig(SamplingFields, RewardFields, LaunchFields, RowFields):
    """Settings for measuring a policy: common prompts and seeds, reward and KL with standard errors."""

    sft: Model
    prompts: Data
    n: int = Field(1, ge=1, description="samples per prompt")
    judge_fn: str | None = Field(None, description="a second score as module:function, reported next to the reward")
    limit: int | None = Field(None, ge=2, description="use only the first prompts of the file")
    seed: Seed = 0


class EvalConfig(DistributionConfig):
    """Reward, KL to the SFT policy, length and truncation of one policy."""

    model: Model


class ParetoConfig(DistributionConfig):
    """The KL-reward front: policies, and the line from init to merge at several eta, all measured the same way."""

    NEEDS: ClassVar[tuple[Need, ...]] = (
        Need(("etas",), "without --merged, where the line ends", lambda config: config.merged is not None),
    )

    policies: tuple[Path, ...] = Field((), description="policy directories")
    init: Path | None = Field(None, description="start of the eta line; default: --sft")
    merged: Path | None = Field(None, description="end of the eta line: the last SLERP, before LITI")
    etas: tuple[float, ...] = Field((0.0, 0.1, 0.3, 0.5, 0.8, 1.0), description="points on the line from init to merge")
    fronts: tuple[Path, ...] = Field(
        (), description="earlier outputs of pareto, measured with the same settings: their points are reused"
    )
    reference: Bounds = ()
    kl_limits: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (), description="KL limits in nats; the best point within each is reported; default: round numbers"
    )

    @model_validator(mode="after")
    def _the_line_is_complete(self) -> ParetoConfig:
        if self.init is not None and self.merged is None:
            raise ValueError("--init is given and --merged is not; give --merged, where the line ends")
        if any(not 0 <= eta <= 1 for eta in self.etas):
            given = " ".join(map(str, self.etas))
            raise ValueError(f"--etas {given}: not all in 0 .. 1; the line goes from 0 to 1")
        return self


class PickConfig(Config):
    """A point of a finished front as a model: the line from init to merge at the chosen eta, or a measured policy."""

    front: Path = Field(description="output of gemma2 pareto")
    pick: Pick = "best-reward"


REWARD = sorted(RewardFields.model_fields.keys() - CallFields.model_fields.keys())
# What a measurement depends on besides files; `reward` names files.
MEASURED_WITH = ("temperature", "max_new_tokens", "n", "limit", "seed", "judge_fn", *REWARD)
BEFORE = {"dtype": "auto", "attention": "auto"}  # of fronts from before a setting existed


def measured_settings(config: ParetoConfig) -> JsonObject:
    """The settings on which the figures of a front depend."""
    found: JsonObject = config.model_dump(mode="json", include=set(MEASURED_WITH))
    return found


def unlike_settings(theirs: JsonMapping, ours: JsonMapping) -> list[str]:
    """What differs between the settings of two fronts, in words; reward models are compared by their weights."""
    return [
        f"{name} {theirs.get(name)!r}, here {ours[name]!r}"
        for name in MEASURED_WITH
        if name != "reward" and theirs.get(name, BEFORE.get(name)) != ours[name]
    ]
