"""`gemma2 sft`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .config import Need
from .fields import AttentionFields, LoraOutputFields, Model, RowFields, StrategyFields, TrainingFields


class SftConfig(TrainingFields, LoraOutputFields, StrategyFields, RowFields, AttentionFields):
    """Supervised fine-tuning on prompts and completions, or on conversations."""

    NEEDS: ClassVar[tuple[Need, ...]] = (
        Need(
            ("eval_every",),
            "without held-out rows",
            lambda config: config.eval_data is not None or config.eval_fraction > 0,
            "give --eval-data, or an --eval-fraction above 0",
        ),
        Need(
            ("eval_fraction",),
            "with --eval-data, which is what is held out",
            lambda config: config.eval_data is None or config.eval_fraction == 0,
            "",
        ),
    )

    model: Model
    data: tuple[Path, ...] = Field(
        min_length=1, description="files, directories or hub data sets of rows; several are mixed"
    )
    eval_data: Path | None = Field(None, description="rows for the held-out loss; default: --eval-fraction of --data")
    weights: tuple[float, ...] = Field(
        (), description="share of each data set in the rows of an epoch; default: every row once"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; default: the whole batch")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens per forward pass, with padding: splits micro-batches further; default: 2048 on a CPU",
    )
    max_length: int = Field(1024, ge=8, description="longest row, tokens")
    on_overlong: Literal["drop", "truncate", "error"] = Field("drop", description="what to do with longer rows")
    end_of_turn: Literal["eot", "eot+eos"] = Field("eot+eos", description="last target of a conversation")
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of prompts held out for the evaluation loss if there is no --eval-data"
    )
    eval_every: int | None = Field(
        None, ge=1, description="optimizer steps between held-out losses; default: only at the start and the end"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="weights to write: the last ones, or those with the lowest held-out loss"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many held-out losses without a new minimum")
    packing: bool = Field(
        False,
        description="join rows up to --max-length; the batch size counts joined rows; needs flex or flash attention",
    )

    @field_validator("data", mode="before")
    @classmethod
    def _one_path_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("weights")
    @classmethod
    def _weights_are_positive(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if any(weight <= 0 for weight in weights):
            raise ValueError("weights must be above 0; leave out a data set that is not wanted")
        return weights

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> SftConfig:
        if self.max_steps is not None:
            self.check_warmup(self.max_steps)
        twice = {str(path) for path in self.data if self.data.count(path) > 1}
        if twice:
            raise ValueError(f"data names {min(twice)} twice; give it a larger weight instead")
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(f"{len(self.weights)} weights for {len(self.data)} data sets; give one each, or none")
        if self.eval_every is None and (self.keep == "best" or self.patience is not None):
            raise ValueError("keep=best and patience compare held-out losses; give eval_every as well")
        if self.packing and self.weights and self.epochs > 1:
            raise ValueError("packing would repeat the rows of the first epoch; drop weights, or set epochs=1")
        if self.packing and self.attention in ("eager", "sdpa"):
            raise ValueError(
                f"packing needs flex or flash attention, {self.attention} would hold all scores of the joined rows; "
                "drop packing (rows of similar length share a batch anyway), or leave attention at auto"
            )
        return self
