"""`gemma2 reward` and its sub-commands: probe, pairs, score, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from .config import Config
from .fields import Data, LoraFields, Model, SamplingFields, Seed, TrainingFields, check_address
from .generate import check_key_variable

Centring = Field(
    0.0, ge=0, description="weight of (r_chosen + r_rejected)^2 in the loss, which centres rewards on 0 (2312.09244)"
)
Heldout = Field(0.1, ge=0, lt=1, description="share of prompts whose pairs are held out for accuracy and calibration")

# What a row is scored on; "truncated" would become chosen_truncated and rejected_truncated.
CONVERSATION = frozenset({"prompt", "completion", "messages", "chosen", "rejected", "finish_reason", "truncated"})


class RewardConfig(TrainingFields, LoraFields):
    """A Bradley-Terry reward model from preference pairs."""

    model: Model
    data: Data
    from_head: Path | None = Field(
        None, description="reward model whose head is the start (gemma2 reward probe); default: drawn from --seed"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="pairs per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="pairs per forward pass; default: the whole batch")
    max_length: int = Field(1024, ge=8, description="longest conversation, tokens")
    center_coefficient: float = Centring
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of what each attention and MLP block adds that is dropped while training"
    )
    eval_fraction: float = Heldout
    eval_every: int | None = Field(
        None, ge=1, description="optimizer steps between held-out figures; default: at the start and the end"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="weights that become the output; best: those with the lowest held-out loss"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after this many held-out losses without a new lowest one"
    )

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> RewardConfig:
        if self.eval_every is None and (self.keep == "best" or self.patience is not None):
            raise ValueError("keep=best and patience compare held-out losses; give eval_every as well")
        if self.eval_every is not None and self.eval_fraction == 0:
            raise ValueError("eval_every measures held-out pairs, and eval_fraction=0 holds none out; give one above 0")
        return self


class ProbeConfig(Config):
    """A reward model whose backbone is left as it is: the best head on its last hidden states (WARM's start)."""

    model: Model
    data: Data
    max_length: int = Field(1024, ge=8, description="longest conversation, tokens")
    batch_size: int = Field(32, ge=1, description="sequences per forward pass")
    l2: float = Field(1e-4, gt=0, description="weight of |w|^2 in the loss; without it, separable pairs have no best w")
    center_coefficient: float = Centring
    eval_fraction: float = Heldout
    seed: Seed = 0


class RewardScoreConfig(Config):
    """Every row of a data set with its score: prompts and completions, conversations, or preference pairs."""

    INCIDENTAL = frozenset({"batch_size"})

    model: Model
    data: Data
    batch_size: int = Field(32, ge=1, description="sequences per forward pass")
    column: str = Field("score", min_length=1, description="name of the score; pairs get chosen_NAME and rejected_NAME")
    max_length: int | None = Field(
        None, ge=8, description="longer conversations get no score, tokens; default: the model's context"
    )
    shard_rows: int = Field(100_000, ge=1, description="rows per output file")
    limit: int | None = Field(None, ge=1, description="use only the first rows")

    @model_validator(mode="after")
    def _conversations_stay(self) -> RewardScoreConfig:
        if self.column in CONVERSATION:
            raise ValueError(f"--column {self.column} is a column that a score is made from; give another name")
        return self


class RewardEvalConfig(Config):
    """Evaluate reward models on preference pairs: accuracy, calibration, and what length has to do with it."""

    models: tuple[Path, ...] = Field(min_length=1, description="reward models; several stand side by side")
    data: Data
    by: str | None = Field(None, min_length=1, description="column of the rows whose values each get a table")
    batch_size: int = Field(32, ge=1, description="sequences per forward pass")
    max_length: int | None = Field(
        None, ge=8, description="longer pairs are left out, tokens; default: the models' context"
    )
    limit: int | None = Field(None, ge=1, description="use only the first pairs")


class PairsConfig(SamplingFields):
    """Preference pairs: n samples per prompt of a model, ranked by a judge."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"judge_concurrency", "judge_key_env"})

    model: Model
    prompts: Data
    judge: str = Field(
        description="reward model directory, reward function as module:function, or openai:MODEL at a server"
    )
    judge_prompt: Path | None = Field(
        None, description="openai: file with the judge's prompt; default: the text in docs/reward-models.md"
    )
    judge_style: Literal["score", "compare"] = Field(
        "score", description="openai: a score per answer, or every two answers compared, in both orders"
    )
    judge_url: str | None = Field(None, description="openai: address of the server, up to and including /v1")
    judge_tokens: int = Field(512, ge=1, description="openai: longest reply of the judge, tokens")
    judge_key_env: str = Field(
        "OPENAI_API_KEY", min_length=1, description="openai: environment variable that holds the key"
    )
    judge_concurrency: int = Field(8, ge=1, le=4096, description="openai: requests in flight at once")
    judge_request: dict[str, Any] = Field(
        default_factory=dict, description="openai: further fields of each request; null takes one of ours out"
    )
    n: int = Field(4, ge=2, description="samples per prompt")
    select: Literal["extremes", "random", "all"] = Field(
        "extremes", description="the best against the worst sample, any two that differ, or all that differ"
    )
    min_margin: float = Field(0.0, ge=0, description="scores must differ by more than this to make a pair")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    seed: Seed = 0

    @property
    def judge_model(self) -> str | None:
        """The judge's name at a server, where it is at one."""
        return self.judge.removeprefix("openai:") if self.judge.startswith("openai:") else None

    @model_validator(mode="after")
    def _judge_options_belong_to_a_server(self) -> PairsConfig:
        given = sorted(name for name in self.model_fields_set if name.startswith("judge_"))
        differ = [
            name
            for name in given
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if self.judge_model is None and differ:
            raise ValueError(f"{differ[0]} is about a judge at a server; give judge=openai:MODEL, or drop it")
        if self.judge_model == "":
            raise ValueError("judge=openai: names no model; write openai:MODEL")
        if self.judge_url is not None:
            check_address(self.judge_url, "--judge-url")
        check_key_variable(self.judge_key_env, "--judge-key-env")
        return self
