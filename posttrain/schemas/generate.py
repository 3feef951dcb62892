"""`gemma2 generate`."""

from __future__ import annotations

from pydantic import Field

from .fields import Data, Model, SamplingFields, Seed


class GenerateConfig(SamplingFields):
    """Teacher completions for a file of prompts."""

    teacher: Model
    prompts: Data
    n: int = Field(1, ge=1, description="completions per prompt")
    keep_truncated: bool = Field(False, description="keep completions that ran into the limit")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    seed: Seed = 0
