"""`gemma2 warp`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from .fields import Data, Model, TrainingFields
from .rlhf import RlFields


class WarpConfig(TrainingFields, RlFields):
    """WARP (2406.16768, Algorithm 1): M policies, SLERP, LITI, repeated I times, then the front."""

    sft: Model
    prompts: Data
    heldout: Data
    policies: int = Field(2, ge=1, le=64, description="M: RL runs per iteration")
    iterations: int = Field(2, ge=1, le=100, description="I: rounds of RL, SLERP and LITI")
    eta: float = Field(0.3, gt=0, le=1, description="LITI: the share of the merge in the next init")
    etas: tuple[float, ...] = Field((0.0, 0.1, 0.3, 0.5, 0.8, 1.0), description="points of the front")
    learning_rate: float = Field(1e-6, gt=0, lt=1, description="peak learning rate (Adam)")
    warmup_steps: int = Field(100, ge=0, description="linear warm-up, optimizer steps")
    judge_fn: str | None = Field(None, description="a second score as module:function, reported beside the reward")
    compare: tuple[Path, ...] = Field((), description="further model directories measured beside the front")
    eval_n: int = Field(1, ge=1, description="samples per held-out prompt in the final evaluation")
    pick: str = Field(
        "best-reward",
        pattern=r"^(best-reward|kl<=\d+(\.\d+)?|eta=\d+(\.\d+)?)$",
        description="which point of the front becomes the model: best-reward, kl<=X or eta=X",
    )
