"""`gemma2 warp`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from .fields import REPEATED, Bounds, Data, Model, Pick, StrategyFields, TrainingFields
from .rlhf import RlFields

VARIED = ("learning_rate", "length_penalty", "missing_eos_penalty", "reward", "beta", "mu", "temperature")


class WarpConfig(TrainingFields, RlFields, StrategyFields):
    """WARP (2406.16768, Algorithm 1): M policies, SLERP, LITI, repeated I times, then the front."""

    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"jobs", "executor", "slurm", "gpus_per_policy", "noise_scale"})

    sft: Model
    prompts: Data
    heldout: Data
    policies: int = Field(2, ge=1, le=64, description="M: RL runs per iteration; 1: plain RL and LITI")
    iterations: int = Field(2, ge=1, le=100, description="I: rounds of RL, SLERP and LITI")
    steps: tuple[int, ...] = Field(
        (100,), min_length=1, description="optimizer steps T of each iteration; later iterations use the last number"
    )
    eta: float = Field(0.3, gt=0, le=1, description="LITI: share of the merge in the next init")
    etas: tuple[float, ...] = Field(
        (0.0, 0.1, 0.3, 0.5, 0.8, 1.0), description="shares of the merge that are measured on every iteration's line"
    )
    vary: tuple[str, ...] = Field(
        (), description=f"settings that differ between the M runs, as KEY=A:B:...; KEY is one of {', '.join(VARIED)}"
    )
    patience: int = Field(
        0, ge=0, description="stop after this many iterations in a row without a better front; 0: never"
    )
    noise_scale: float | None = Field(
        None,
        gt=0,
        description="completions per policy at which task vectors are 60 degrees apart, from the summary of an earlier "
        "run; used to warn of a run in which merging can gain little; default: unknown, 1000 for models of gemma2 tiny",
    )
    learning_rate: float = Field(
        1e-6, gt=0, lt=1, description="peak learning rate (Adam); with LoRA the default is ten times as large"
    )
    reference: Bounds = ()
    judge_fn: str | None = Field(None, description="a second score as module:function, reported next to the reward")
    compare: tuple[Path, ...] = Field((), description="further model directories to measure with the front")
    eval_n: int = Field(1, ge=1, description="samples per held-out prompt in the evaluations of the front")
    eval_limit: int | None = Field(None, ge=2, description="use only the first held-out prompts for the front")
    pick: Pick = "best-reward"
    cpus: int | None = Field(None, ge=1, description="threads per stage; default: number of cores / --jobs")
    jobs: int = Field(1, ge=1, le=1024, description="stages that run at the same time")
    executor: Literal["local", "ray", "slurm"] = Field(
        "local", description="where stages run: on this machine, on a Ray cluster, or as SLURM jobs"
    )
    slurm: tuple[str, ...] = Field(
        (),
        description="option of sbatch for every stage, as KEY=VALUE: partition=gpu; repeatable",
        json_schema_extra=REPEATED,
    )
    gpus: int | None = Field(
        None, ge=1, le=1024, description="GPUs of this machine that all stages share; default: all that are visible"
    )
    gpus_per_policy: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="GPUs of an RL run on each of its machines; default: on this machine the fewest that it fits",
    )
    nodes: int = Field(1, ge=1, le=1024, description="machines of an RL run, with --executor ray or slurm")

    @field_validator("steps", mode="before")
    @classmethod
    def _one_number_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("steps")
    @classmethod
    def _at_least_one_step(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("every iteration needs at least one step")
        return value

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        self.check_warmup(min(self.steps))
        if len(self.steps) > self.iterations:
            raise ValueError(f"--steps has {len(self.steps)} numbers for {self.iterations} iterations; drop some")
        if self.slurm and self.executor != "slurm":
            raise ValueError("--slurm is for --executor slurm; give that too, or drop it")
        if self.gpus is not None and self.executor != "local":
            raise ValueError(f"--gpus is for --executor local; drop it, --executor {self.executor} knows its cluster")
        if any(not 0 <= eta <= 1 for eta in self.etas) or not self.etas:
            raise ValueError("--etas are shares of the merge; give numbers from 0 to 1")
        for item in self.vary:
            key, equals, values = item.partition("=")
            if not equals or key.replace("-", "_") not in VARIED:
                raise ValueError(f"--vary {item} is not KEY=A:B; KEY is one of {', '.join(VARIED)}")
            if len(values.split(":")) != self.policies:
                raise ValueError(
                    f"--vary {item} gives {len(values.split(':'))} values for {self.policies} policies; give one each"
                )
        return self

    def steps_of(self, iteration: int) -> int:
        """T of an iteration, counted from 1."""
        return self.steps[min(iteration, len(self.steps)) - 1]
