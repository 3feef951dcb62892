"""The embedded models, import, merges inside a pipeline, and the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gemma2.posttrain.config import Config

from .fields import Seed


class TinyConfig(Config):
    """The embedded models: a small real Gemma 2 student and its teacher, trained from scratch."""

    train_prompts: int = Field(768, ge=8, description="prompts written to prompts.jsonl")
    heldout_prompts: int = Field(256, ge=8, description="prompts written to heldout.jsonl, none of them trained on")
    seed: Seed = 0


class ConvertConfig(Config):
    """Import a model as plain safetensors, with all its stop ids, a chat template and a pad token that is no stop."""

    source: Path = Field(description="GGUF file, a directory with one, or a model directory")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the written weights")


class MergeConfig(Config):
    """A merge inside a pipeline. `gemma2 merge` has the full set of options."""

    method: Literal["slerp", "liti", "warp", "linear", "ema"]
    models: tuple[Path, ...] = Field(min_length=1, description="model directories; their order counts")
    base: Path | None = Field(None, description="the init that task vectors start from")
    etas: tuple[float, ...] = Field((), description="LITI: share of the merge in the result")


class QuickstartConfig(Config):
    """The whole path on the embedded models. Each section holds settings of the step of that name."""

    seed: Seed = 0
    train_prompts: int = Field(768, ge=8, description="prompts that the teacher answers and RL trains on")
    heldout_prompts: int = Field(256, ge=8, description="prompts that every figure of the final table is measured on")
    generate: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 generate")
    filter: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 filter")
    sft: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 sft")
    distill: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 distill")
    pairs: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 reward pairs")
    reward: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 reward")
    warp: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 warp")
