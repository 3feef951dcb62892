"""The embedded models, import, and merges inside a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from gemma2.merging.methods.request import Granularity, MergeRequest

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


class MergeConfig(Config):
    """`gemma2 merge METHOD` inside a pipeline; the names are those of its flags."""

    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset({"method", "models"})

    method: str = Field(description="merge method: the second word of the command")
    models: tuple[Path, ...] = Field(min_length=1, description="model directories or hub ids; their order counts")
    base: Path | None = Field(None, description="the init that task vectors start from")
    t: float | None = Field(None, ge=0, le=1, description="share of the second of two models")
    eta: tuple[float, ...] = Field((), max_length=1, description="share of the merged model in the result")
    weights: tuple[float, ...] = Field((), description="one per model; default: the method's own")
    normalize: bool | None = Field(None, description="divide by the sum of the weights that take part")
    decay: float | None = Field(None, ge=0, le=1, description="share of the average so far at each checkpoint")
    uniform: bool = Field(False, description="ema: plain average of the checkpoints")
    scale: float | None = Field(None, ge=-100, le=100, description="factor of the result")
    density: tuple[float, ...] = Field((), description="share of elements kept: one, or one per model")
    gamma: tuple[float, ...] = Field((), description="share of the largest elements dropped: one, or one per model")
    epsilon: tuple[float, ...] = Field((), description="half the spread of the keep probability: one, or one per model")
    rescale: bool | None = Field(None, description="divide what is kept by its keep probability")
    seed: int = Field(0, ge=0, description="of the random masks")
    iterations: int | None = Field(None, ge=1, description="most steps of the mean")
    tolerance: float | None = Field(None, gt=0, description="radians; a shorter step is the last")
    granularity: Granularity | None = Field(None, description="what shares coefficients or thresholds")
    tokenizer: str | None = Field(None, description="whose tokenizer the output has: base, union or a model")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="of the output")

    @field_validator("eta", "weights", "density", "gamma", "epsilon", mode="before")
    @classmethod
    def _one_number_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _ema_needs_its_kind(self) -> MergeConfig:
        if self.method == "ema" and (self.decay is None) != self.uniform:
            raise ValueError("merge ema needs decay or uniform, and not both; choose one")
        return self

    def request(self) -> MergeRequest:
        """The merge as the engine takes it."""
        lists: dict[str, Any] = {
            name: getattr(self, name) or None for name in ("weights", "density", "gamma", "epsilon")
        }
        plain = ("base", "t", "normalize", "decay", "scale", "rescale", "seed", "iterations", "tolerance")
        named: dict[str, Any] = {name: getattr(self, name) for name in (*plain, "granularity", "tokenizer", "dtype")}
        return MergeRequest(method=self.method, models=self.models, etas=self.eta, **named, **lists)

    def recorded(self) -> dict[str, Any]:
        """As the engine records it: options and defaults, no paths. Raises UsageError for an option not taken."""
        from gemma2.merging.methods.table import check_request  # numpy, which --help does not pay for

        return check_request(self.request()).options()
