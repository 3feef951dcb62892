"""`gemma2 rlhf`, and the fields of the RL stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from gemma2.posttrain.config import Config

from .fields import Data, Model, TrainingFields


class RewardFields(Config):
    """What a completion is worth."""

    reward: Path | None = Field(None, description="reward model directory")
    reward_fn: str | None = Field(None, description="reward function as module:function, instead of a reward model")
    length_penalty: float = Field(0.0, ge=0, description="subtracted per token (WARP, App. E: 0.0005)")
    missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted from a completion that was cut at the limit")


class RlFields(RewardFields):
    """The RL stage of WARP (2406.16768, Algorithm 1, lines 3-8)."""

    steps: int = Field(100, ge=1, description="optimizer steps T")
    prompts_per_step: int = Field(16, ge=1, description="distinct prompts per optimizer step")
    n: int = Field(4, ge=2, description="samples per prompt: the group of the leave-one-out baseline")
    beta: float = Field(0.1, ge=0, description="weight of the KL to the anchor, per nat")
    anchor: Literal["ema", "sft", "none"] = Field("ema", description="what the KL of the reward is measured to")
    mu: float = Field(0.01, ge=0, le=1, description="EMA rate of the anchor, per optimizer step")
    temperature: float = Field(0.9, gt=0, le=5, description="sampling temperature")
    max_new_tokens: int = Field(128, ge=1, description="completion limit, tokens")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; default: the whole batch")
    eval_every: int = Field(100, ge=1, description="optimizer steps between evaluations on held-out prompts")
    eval_prompts: int = Field(64, ge=2, description="held-out prompts per evaluation")
    max_kl: float | None = Field(
        200.0, gt=0, description="stop when the KL to the SFT policy reaches this, nats per sequence"
    )
    max_dead_steps: int = Field(50, ge=1, description="stop after this many steps without any difference in reward")


class RlhfConfig(TrainingFields, RlFields):
    """RL from a reward model, with the KL anchored to an EMA of the policy."""

    policy: Model
    prompts: Data
    sft: Path | None = Field(None, description="the policy that the measured KL refers to; default: --policy")
    heldout: Path | None = Field(None, description="JSONL of evaluation prompts; default: a tenth of --prompts")
    learning_rate: float = Field(1e-6, gt=0, lt=1, description="peak learning rate (Adam)")
    warmup_steps: int = Field(100, ge=0, description="linear warm-up, optimizer steps")
