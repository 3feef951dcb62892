"""The embedded models, import, and the tools of `gemma2 merge` inside a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from .config import Config
from .fields import Seed

if TYPE_CHECKING:
    from gemma2.merging.lora.extract_plan import ExtractRequest


class TinyConfig(Config):
    """The embedded models: a small real Gemma 2 student and its teacher, trained from scratch."""

    train_prompts: int = Field(768, ge=8, description="prompts written to prompts.jsonl")
    heldout_prompts: int = Field(256, ge=8, description="prompts written to heldout.jsonl, not used in training")
    width: int = Field(
        96,
        ge=32,
        le=1024,
        multiple_of=32,
        description="hidden size of the student: 96 is half a million weights, 192 two",
    )
    seed: Seed = 0


class ConvertConfig(Config):
    """Import a model as plain safetensors, with all stop ids, a chat template and a pad token that is not a stop."""

    source: Path = Field(description="GGUF file, a directory with one, or a model directory")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the written weights")


class ExtractLoraConfig(Config):
    """`gemma2 merge extract-lora` inside a pipeline: the difference of a model and its base as a LoRA adapter."""

    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset({"model"})

    model: Path = Field(description="model directory or hub id")
    base: Path = Field(description="the model that it was trained from")
    rank: int | None = Field(None, ge=1, description="rank of the factors; with explained the largest one")
    explained: float | None = Field(None, gt=0, le=1, description="share of each squared difference that factors hold")
    target_modules: tuple[str, ...] = Field((), description="modules that get factors")
    save_modules: tuple[str, ...] = Field((), description="modules that are stored whole if they differ, or all")
    leave_out: bool = Field(False, description="leave out what differs and has no place in the adapter")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("float32", description="dtype of the factors")

    def request(self) -> ExtractRequest:
        """The extraction as the engine takes it."""
        from gemma2.merging.lora.extract_plan import ExtractRequest

        return ExtractRequest(
            model=self.model,
            base=self.base,
            rank=self.rank,
            explained=self.explained,
            target_modules=self.target_modules,
            save_modules=self.save_modules,
            leave_out=self.leave_out,
            dtype=self.dtype,
        )

    def recorded(self) -> dict[str, Any]:
        """As the engine records it: no paths, and no defaults."""
        return self.request().options()


class ReplaceTokenizerConfig(Config):
    """`gemma2 merge replace-tokenizer` inside a pipeline."""

    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset({"model"})

    model: Path = Field(description="model directory or hub id")
    tokenizer: Path = Field(description="directory or hub id with the new tokenizer.json")

    def recorded(self) -> dict[str, Any]:
        """As the engine records it: without the paths."""
        return {}
