"""`gemma2 distill` and `gemma2 distill cache`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from .config import Need
from .fields import AttentionFields, Data, Dtype, LoraFields, Model, RowFields, Seed, StrategyFields, TrainingFields


class FixedDataFields(RowFields, AttentionFields):
    """Settings for tokenising existing rows and for loading models."""

    max_length: int = Field(1024, ge=8, description="longest row of --data, tokens")
    on_overlong: Literal["drop", "truncate", "error"] = Field("drop", description="what to do with longer rows")
    end_of_turn: Literal["eot", "eot+eos"] = Field("eot+eos", description="last target of a row of --data")
    teacher_dtype: Dtype = Field("auto", description="auto: bfloat16 on an accelerator, float32 on the CPU")
    distill_temperature: float = Field(
        1.0, gt=0, le=100, description="softmax temperature of teacher and student inside the divergence"
    )


class DistillConfig(TrainingFields, LoraFields, StrategyFields, FixedDataFields):
    """Distillation from a teacher on the student's own completions (GKD, 2306.13649)."""

    NEEDS: ClassVar[tuple[Need, ...]] = (
        Need(
            ("max_length", "on_overlong", "end_of_turn", "eval_fraction"),
            "without --data or --teacher-cache",
            lambda config: config.data is not None or config.teacher_cache is not None,
            "give one of them",
        ),
        Need(
            ("n", "temperature", "max_new_tokens", "eval_prompts"),
            "with --teacher-cache, which brings its completions",
            lambda config: config.teacher_cache is None,
            "",
        ),
    )

    model: Model
    teacher: Path | None = Field(None, description="teacher model directory, with the student's tokenizer")
    teacher_cache: Path | None = Field(
        None, description="output of gemma2 distill cache, instead of --teacher; needs neither prompts nor data"
    )
    prompts: Path | None = Field(None, description="prompts that the student answers during training")
    heldout: Path | None = Field(None, description="evaluation prompts; default: a tenth of --prompts")
    data: Path | None = Field(None, description="fixed prompts and completions, used if --lambda is below 1")
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = Field(
        "reverse-kl", description="KL(teacher || student), KL(student || teacher), or JSD with --beta"
    )
    beta: float | None = Field(
        None, gt=0, lt=1, description="weight of the teacher in the mixture of jsd; default: 0.5"
    )
    on_policy_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="lambda: share of steps on the student's own completions; default: 1, or 0 from a cache",
    )
    steps: int = Field(100, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; default: the whole batch")
    n: int = Field(1, ge=1, description="samples per prompt")
    temperature: float = Field(1.0, gt=0, le=5, description="sampling temperature of the student")
    max_new_tokens: int = Field(256, ge=1, description="completion limit, tokens")
    eval_every: int = Field(100, ge=1, description="optimizer steps between evaluations on held-out prompts")
    eval_prompts: int = Field(64, ge=2, description="held-out prompts per evaluation")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="share of --data, or of the cache, that is held out")

    @property
    def fraction(self) -> float:
        """The effective lambda; by default 1, or 0 from a cache."""
        if self.on_policy_fraction is not None:
            return self.on_policy_fraction
        return 0.0 if self.teacher_cache else 1.0

    @model_validator(mode="before")
    @classmethod
    def _recipes_may_say_lambda(cls, values: object) -> object:
        """Accept GKD's name, a reserved word of Python. A flag arrives under the field's name and wins over it."""
        if isinstance(values, dict) and "lambda" in values:
            return {"on_policy_fraction": values["lambda"]} | {k: v for k, v in values.items() if k != "lambda"}
        return values

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> DistillConfig:
        self.check_warmup(self.steps)
        live, cached = self.teacher is not None, self.teacher_cache is not None
        micro = self.micro_batch_size or self.batch_size
        problems = {
            "give teacher or teacher_cache, one of them": live == cached,
            "a teacher needs prompts, for training and for evaluation": live and self.prompts is None,
            "a teacher_cache brings its own data; leave out prompts, heldout and data": cached
            and any((self.prompts, self.heldout, self.data)),
            "a teacher_cache does not cover new completions; lambda (on_policy_fraction) must be 0": cached
            and self.fraction > 0,
            f"lambda (on_policy_fraction) {self.fraction:g} needs fixed data; give data": live
            and self.fraction < 1
            and self.data is None,
            "beta belongs to divergence=jsd": self.beta is not None and self.divergence != "jsd",
            f"batch_size {self.batch_size} is not a multiple of n {self.n}": self.batch_size % self.n > 0,
            f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}": self.batch_size % micro > 0,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
        return self


class DistillCacheConfig(FixedDataFields):
    """The teacher's distributions over fixed data, top-k and the rest as one bucket, to distill without the teacher."""

    teacher: Model
    data: Data
    top_k: int = Field(64, ge=1, description="tokens kept per position; the rest is one bucket")
    batch_size: int = Field(16, ge=1, description="sequences per forward pass")
    shard_rows: int = Field(1024, ge=1, description="rows per file; a killed run repeats at most this many")
    limit: int | None = Field(None, ge=1, description="use only the first rows of the data")
    seed: Seed = 0
