"""`gemma2 eval suite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gemma2.posttrain.schemas.fields import LaunchFields, Model, PrecisionFields, refuse_kernel_of_sampler

TaskName = Literal["mmlu", "arc_challenge", "gsm8k", "winogrande", "hellaswag"]


class SuiteConfig(PrecisionFields, LaunchFields):
    """Few-shot benchmarks with the shots and metrics of Gemma 2's report: accuracy or exact match for each task.

    MMLU 5-shot, ARC-challenge 25, GSM8K 5, Winogrande 5, HellaSwag 10: prompts and metrics are those of lm-eval 0.4.13.
    """

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"doctor"})

    model: Model
    data: Path = Field(description="directory with a file TASK.jsonl for each task; gemma2 eval data writes them")
    against: Path | None = Field(
        None,
        description="another model, measured in the same way, or the result of one; compared row by row",
    )
    published: Literal["v3", "blog", "card"] = Field(
        "v3", description="source of the published rows: report v3, blog post of June 2024, or model cards"
    )
    suite: Literal["gemma2"] = Field("gemma2", description="which tasks, with their shots and metrics")
    tasks: tuple[TaskName, ...] = Field((), description="tasks of the suite to run; default: all")
    engine: Literal["gemma2", "hf", "vllm"] = Field(
        "gemma2", description="what computes log-probs and answers: gemma2's own code, or lm-eval's hf or vllm"
    )
    chat: Literal["auto", "on", "off"] = Field(
        "auto", description="write prompts as chat turns; auto: if the model has a chat template and answers chats"
    )
    fewshot_as_multiturn: bool = Field(
        True, description="with chat: every example as two turns, or all examples in the one user turn"
    )
    limit: int | None = Field(None, ge=1, description="use only the first rows of each task, in MMLU of each subject")
    max_new_tokens: int = Field(256, ge=1, description="limit of a written answer (GSM8K), tokens")
    batch_size: int = Field(16, ge=1, description="rows that are scored or answered at once")
    doctor: bool = Field(True, description="refuse a model that gemma2 doctor --quick calls broken")
    seed: Annotated[int, Field(ge=0, description="seed of the few-shot examples; 1234 is lm-eval's")] = 1234

    @model_validator(mode="after")
    def _the_kernel_runs(self) -> Self:
        refuse_kernel_of_sampler(self.attention, "on the suite, which shares what rows begin with by masks")
        if self.engine != "gemma2" and self.attention not in ("auto", "eager"):
            raise ValueError(f"--attention {self.attention} has no effect with --engine {self.engine}; leave it out")
        return self
