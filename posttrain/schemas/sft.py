"""`gemma2 sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .fields import Data, LoraFields, Model, TrainingFields


class SftConfig(TrainingFields, LoraFields):
    """Supervised fine-tuning on prompt and completion, or on conversations."""

    model: Model
    data: Data
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; default: the whole batch")
    max_length: int = Field(1024, ge=8, description="longest row, tokens")
    on_overlong: Literal["drop", "truncate", "error"] = Field("drop", description="what happens to longer rows")
    end_of_turn: Literal["eot", "eot+eos"] = Field("eot+eos", description="last target of a conversation")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="share of rows held out for the evaluation loss")
