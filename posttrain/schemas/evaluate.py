"""`gemma2 eval`, `gemma2 pareto` and `gemma2 pick`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from .config import Config
from .fields import Data, Model, RowFields, SamplingFields, Seed
from .rlhf import RewardFields


class DistributionConfig(SamplingFields, RewardFields, RowFields):
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

    policies: tuple[Path, ...] = Field((), description="policy directories")
    init: Path | None = Field(None, description="start of the eta line; default: --sft")
    merged: Path | None = Field(None, description="end of the eta line: the last SLERP, before LITI")
    etas: tuple[float, ...] = Field((0.0, 0.1, 0.3, 0.5, 0.8, 1.0), description="points on the line from init to merge")
    fronts: tuple[Path, ...] = Field(
        (), description="earlier outputs of pareto, measured with the same settings: their points are reused"
    )
    reference: tuple[float, ...] = Field(
        (),
        description="KL,REWARD that bound the hypervolume; default: largest KL of a point with more reward than --sft",
    )
    kl_limits: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (), description="KL limits in nats; the best point within each is reported; default: round numbers"
    )


class PickConfig(Config):
    """A point of a finished front as a model: the line from init to merge at the chosen eta, or a measured policy."""

    front: Path = Field(description="output of gemma2 pareto")
    pick: str = Field(
        "best-reward",
        pattern=r"^(best-reward|kl<=\d+(\.\d+)?|eta=\d+(\.\d+)?)$",
        description="which point: best-reward, kl<=X (the best within X nats) or eta=E (on the last iteration's line)",
    )
