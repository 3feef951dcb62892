"""`gemma2 eval` and `gemma2 pareto`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from .fields import Data, Model, SamplingFields, Seed
from .rlhf import RewardFields


class DistributionConfig(SamplingFields, RewardFields):
    """How a policy is measured: common prompts, common seeds, reward and KL with standard errors."""

    sft: Model
    prompts: Data
    n: int = Field(1, ge=1, description="samples per prompt")
    judge_fn: str | None = Field(None, description="a second score as module:function, reported beside the reward")
    limit: int | None = Field(None, ge=2, description="use only the first prompts of the file")
    seed: Seed = 0


class EvalConfig(DistributionConfig):
    """Reward, KL to the SFT policy, length and truncation of one policy."""

    model: Model


class ParetoConfig(DistributionConfig):
    """The KL-reward front: policies, and the line from init to merge at several eta, measured alike."""

    policies: tuple[Path, ...] = Field((), description="policy directories")
    init: Path | None = Field(None, description="where the eta line starts; default: --sft")
    merged: Path | None = Field(None, description="where the eta line ends: the last SLERP, before LITI")
    etas: tuple[float, ...] = Field((0.0, 0.1, 0.3, 0.5, 0.8, 1.0), description="points on the line from init to merge")
