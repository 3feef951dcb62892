"""The embedded models, import, and merges inside a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from .config import Config
from .fields import Seed


class TinyConfig(Config):
    """The embedded models: a small real Gemma 2 student and its teacher, trained from scratch."""

    train_prompts: int = Field(768, ge=8, description="prompts written to prompts.jsonl")
    heldout_prompts: int = Field(256, ge=8, description="prompts written to heldout.jsonl, not used in training")
    seed: Seed = 0


class ConvertConfig(Config):
    """Import a model as plain safetensors, with all stop ids, a chat template and a pad token that is not a stop."""

    source: Path = Field(description="GGUF file, a directory with one, or a model directory")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the written weights")
