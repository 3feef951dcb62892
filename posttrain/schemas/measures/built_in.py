"""The forms of `gemma2 eval` that need no extra: perplexity, questions with answers, multiple choice, win rate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.fields import (
    LaunchFields,
    Model,
    PrecisionFields,
    RowFields,
    SamplingFields,
    Seed,
    refuse_kernel_of_sampler,
)
from gemma2.posttrain.schemas.reward import JudgeFields
from gemma2.posttrain.schemas.rlhf import RewardFields

__all__ = ["ChoicesConfig", "PerplexityConfig", "QaConfig", "ShotFields", "WinRateConfig"]

Rows = Annotated[Path, Field(description="rows: JSONL, JSON, CSV or parquet file, directory, or hub data set")]


class DoctorFields(Config):
    """Whether models are looked at before they are measured."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"doctor"})

    doctor: bool = Field(True, description="refuse a model that gemma2 doctor --quick calls broken")


class MeasureFields(PrecisionFields, DoctorFields, LaunchFields, RowFields):
    """Settings of every measure."""

    model: Model
    against: Path | None = Field(
        None, description="compare row by row with a second model, measured in the same way, or with an earlier result"
    )
    batch_size: int = Field(32, ge=1, description="sequences generated or scored at once")


class PerplexityConfig(MeasureFields):
    """Perplexity of texts: per token, per word, and as bits per byte."""

    perplexity: tuple[Path, ...] = Field(
        min_length=1,
        description="text files, each read as one document, or rows with a column 'text', each a document",
    )
    window: int | None = Field(
        None, ge=2, description="tokens the model sees at once, the <bos> included; default: the model's context"
    )
    overlap: int = Field(
        0, ge=0, description="tokens of each window that only give context: they were counted in the window before"
    )
    limit: int | None = Field(None, ge=1, description="use only the first documents of each file")

    @field_validator("perplexity", mode="before")
    @classmethod
    def _one_file_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _a_window_has_room(self) -> PerplexityConfig:
        if self.window is not None and self.overlap > self.window - 2:
            raise ValueError(
                f"--overlap {self.overlap} leaves no token to count in a --window of {self.window}; "
                f"give at most {self.window - 2}"
            )
        return self


class ShotFields(Config):
    """The form of a question."""

    shots: int = Field(0, ge=0, le=100, description="solved questions in front of each: other rows, drawn by the seed")
    chat: Literal["auto", "on", "off"] = Field(
        "auto", description="ask in the chat format; auto: if the model has a chat template and answers chats"
    )
    system: str | None = Field(None, min_length=1, description="system text for every question without one")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    seed: Seed = 0


class QaConfig(MeasureFields, ShotFields):
    """Questions with known answers: exact match, and match of the last number, of greedy answers."""

    qa: Rows
    max_new_tokens: int = Field(256, ge=1, description="limit of an answer, tokens")

    @model_validator(mode="after")
    def _the_kernel_runs(self) -> Self:
        refuse_kernel_of_sampler(self.attention, "on --qa, whose answers are drawn: the sampler takes eager or sdpa")
        return self

    extract: str | None = Field(
        None, min_length=1, description="regular expression: its first group, or last match, is the answer in a reply"
    )

    @field_validator("extract")
    @classmethod
    def _extract_is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class ChoicesConfig(MeasureFields, ShotFields):
    """Multiple choice: the likeliest answer, by its log-probability and by that per byte."""

    choices: Rows


class WinRateConfig(SamplingFields, RewardFields, JudgeFields, DoctorFields, LaunchFields, RowFields):
    """Answers of two models to the same prompts, side by side: by a reward, or on the +-1.5 scale by a judge."""

    REWARD_NEEDED = False

    model: Model
    win_rate: Path = Field(description="the other model: directory or hub id")
    prompts: Annotated[Path, Field(description="prompts: rows as for gemma2 generate")]
    judge_prompt: Path | None = Field(
        None, description="openai: file with the judge's prompt; default: the text in docs/measures.md"
    )
    temperature: float = Field(0.0, ge=0.0, le=5.0, description="sampling temperature; 0 is greedy")
    margin: float = Field(0.0, ge=0, description="rewards that differ by no more than this are a tie")
    limit: int | None = Field(None, ge=1, description="use only the first prompts")
    seed: Seed = 0

    @model_validator(mode="after")
    def _there_is_one_referee(self) -> WinRateConfig:
        if bool(self.reward_terms) == (self.judge is not None):
            raise ValueError("give a reward model with --reward, or a judge with --judge, and not both")
        if not self.reward and (self.judge is None or self.judge_model is not None):
            refuse_kernel_of_sampler(self.attention, "without a reward model: the sampler takes eager or sdpa")
        return self
