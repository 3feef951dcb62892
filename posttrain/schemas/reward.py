"""`gemma2 reward` and its sub-commands: probe, pairs, score, eval."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from gemma2.core.json_files import JsonObject

from .config import Config
from .fields import (
    AttentionFields,
    CallFields,
    Data,
    LaunchFields,
    LoraFields,
    Model,
    PrecisionFields,
    RowFields,
    SamplingFields,
    Seed,
    StrategyFields,
    TrainingFields,
    check_address,
    refuse_kernel_of_sampler,
)
from .generate import check_key_variable

Centring = Field(
    0.0, ge=0, description="weight of (r_chosen + r_rejected)^2 in the loss, to centre rewards on 0 (2312.09244)"
)
Heldout = Field(0.1, ge=0, lt=1, description="share of prompts whose pairs are held out for accuracy and calibration")

# Columns that scores are computed from; "truncated" would become chosen_truncated and rejected_truncated.
CONVERSATION = frozenset({"prompt", "completion", "messages", "chosen", "rejected", "finish_reason", "truncated"})


class RewardConfig(TrainingFields, LoraFields, StrategyFields, RowFields, AttentionFields):
    """A Bradley-Terry reward model from preference pairs."""

    model: Model
    data: Data
    from_head: Path | None = Field(
        None, description="reward model that gives the initial head (gemma2 reward probe); default: random, from --seed"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="pairs per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="pairs per forward pass; default: the whole batch")
    max_length: int = Field(1024, ge=8, description="longest conversation, tokens")
    center_coefficient: float = Centring
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout probability of the output of each attention and MLP block in training"
    )
    eval_fraction: float = Heldout
    eval_every: int | None = Field(
        None, ge=1, description="optimizer steps between held-out figures; default: only at the start and the end"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="weights to write: the last ones, or those with the lowest held-out loss"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many held-out losses without a new minimum")

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> RewardConfig:
        if self.max_steps is not None:
            self.check_warmup(self.max_steps)
        if self.eval_every is None and (self.keep == "best" or self.patience is not None):
            raise ValueError("keep=best and patience compare held-out losses; give eval_every as well")
        if self.eval_every is not None and self.eval_fraction == 0:
            raise ValueError("eval_every needs held-out pairs, and eval_fraction is 0; give an eval_fraction above 0")
        return self


class ProbeConfig(RowFields, AttentionFields):
    """A reward model with a frozen backbone: the best head on its last hidden states (WARM's initial head)."""

    model: Model
    data: Data
    max_length: int = Field(1024, ge=8, description="longest conversation, tokens")
    batch_size: int = Field(32, ge=1, description="sequences per forward pass")
    l2: float = Field(1e-4, gt=0, description="weight of |w|^2 in the loss; without it, separable pairs have no best w")
    center_coefficient: float = Centring
    eval_fraction: float = Heldout
    seed: Seed = 0


class RewardScoreConfig(PrecisionFields, LaunchFields, RowFields):
    """Add a score to every row of a data set: prompts and completions, conversations, or preference pairs."""

    INCIDENTAL = frozenset({"batch_size"})

    model: Model
    data: Data
    batch_size: int = Field(32, ge=1, description="sequences per forward pass")
    column: str = Field("score", min_length=1, description="column to write; pairs get chosen_NAME and rejected_NAME")
    max_length: int | None = Field(
        None, ge=8, description="limit in tokens; longer conversations get no score; default: the model's context"
    )
    shard_rows: int = Field(100_000, ge=1, description="rows per output file")
    limit: int | None = Field(None, ge=1, description="use only the first rows")

    @model_validator(mode="after")
    def _the_column_is_new(self) -> RewardScoreConfig:
        if self.column in CONVERSATION:
            raise ValueError(f"--column {self.column} is a column that scores are computed from; give another name")
        return self


class RewardEvalConfig(PrecisionFields, LaunchFields, RowFields):
    """Measure how well reward models order preference pairs: accuracy, calibration, and the influence of length."""

    models: tuple[Path, ...] = Field(min_length=1, description="reward models; several are compared side by side")
    data: Data
    by: str | None = Field(None, min_length=1, description="column of the rows; adds a table by its values")
    batch_size: int = Field(32, ge=1, description="sequences per forward pass")
    max_length: int | None = Field(
        None, ge=8, description="limit in tokens; longer pairs are left out; default: the models' context"
    )
    limit: int | None = Field(None, ge=1, description="use only the first pairs")


class JudgeFields(Config):
    """A judge of answers: a reward model, or a language model on a server."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"judge_concurrency", "judge_key_env"})
    PATHS_AS_TEXT: ClassVar[frozenset[str]] = frozenset({"judge"})

    judge: str | None = Field(None, description="reward model directory, or openai:MODEL on a server")
    judge_prompt: Path | None = Field(
        None, description="openai: file with the judge's prompt; default: the text in docs/reward-models.md"
    )
    judge_url: str | None = Field(None, description="openai: address of the server, including /v1")
    judge_tokens: int = Field(512, ge=1, description="openai: longest reply of the judge, tokens")
    judge_key_env: str = Field(
        "OPENAI_API_KEY", min_length=1, description="openai: environment variable that holds the key"
    )
    judge_concurrency: int = Field(8, ge=1, le=4096, description="openai: requests at the same time")
    judge_request: JsonObject = Field(
        default_factory=dict, description="openai: further fields of each request; null removes a default field"
    )

    @property
    def judge_model(self) -> str | None:
        """The judge's model name on its server; None for other judges."""
        return self.judge.removeprefix("openai:") if self.judge and self.judge.startswith("openai:") else None

    @model_validator(mode="after")
    def _judge_options_belong_to_a_server(self) -> Self:
        given = sorted(name for name in self.model_fields_set if name.startswith("judge_"))
        differ = [
            name
            for name in given
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if self.judge_model is None and differ:
            raise ValueError(f"{differ[0]} is for a judge on a server; give judge=openai:MODEL, or drop it")
        if self.judge_model == "":
            raise ValueError("judge=openai: names no model; write openai:MODEL")
        if self.judge_url is not None:
            check_address(self.judge_url, "--judge-url")
        check_key_variable(self.judge_key_env, "--judge-key-env")
        return self


class PairsConfig(SamplingFields, CallFields, PrecisionFields, JudgeFields, RowFields):
    """Preference pairs: n samples per prompt of a model, ranked by a judge."""

    model: Model
    prompts: Data
    judge: str = Field(
        description="reward model directory, reward function as module:function, or openai:MODEL on a server"
    )
    judge_style: Literal["score", "compare"] = Field(
        "score", description="openai: score each answer, or compare every two answers in both orders"
    )
    n: int = Field(4, ge=2, description="samples per prompt")
    select: Literal["extremes", "random", "all"] = Field(
        "extremes", description="pairs to write: the best and the worst sample, any two that differ, or all that differ"
    )
    min_margin: float = Field(0.0, ge=0, description="the scores of a pair must differ by more than this")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    seed: Seed = 0

    @model_validator(mode="after")
    def _the_kernel_runs(self) -> Self:
        if ":" in self.judge:
            refuse_kernel_of_sampler(self.attention, "without a reward model as judge: the sampler takes eager or sdpa")
        return self
