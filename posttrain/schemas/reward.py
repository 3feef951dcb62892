"""`gemma2 reward` and `gemma2 reward pairs`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .fields import Data, LoraFields, Model, SamplingFields, Seed, TrainingFields


class RewardConfig(TrainingFields, LoraFields):
    """A Bradley-Terry reward model from preference pairs."""

    model: Model
    data: Data
    epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="pairs per optimizer step")
    max_length: int = Field(1024, ge=8, description="longest conversation, tokens")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="share of pairs held out for accuracy and calibration")


class PairsConfig(SamplingFields):
    """Preference pairs: n samples per prompt of a model, ranked by a judge."""

    model: Model
    prompts: Data
    judge: str = Field(description="reward function as module:function, or the directory of a reward model")
    n: int = Field(4, ge=2, description="samples per prompt")
    select: Literal["extremes", "random", "all"] = Field(
        "extremes", description="the best against the worst sample, any two that differ, or all that differ"
    )
    min_margin: float = Field(0.0, ge=0, description="scores must differ by more than this to make a pair")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    seed: Seed = 0
