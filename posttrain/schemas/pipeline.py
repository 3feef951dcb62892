"""Pipeline files: stages that name a command, its options, and each other's outputs."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from .config import Config

__all__ = ["PipelineFile", "Resources", "StageFile"]

STAGE_NAME = r"^[A-Za-z0-9][\w.=-]*(/[A-Za-z0-9][\w.=-]*)*$"
# Sections and prefixes of references; files in a pipeline's folder other than the stages.
RESERVED = frozenset({"vars", "resources", "stages", "matrix", "logs"})
RESERVED |= {"pipeline.json", "pipeline.yaml", "gemma2.json", "summary.json", "report.html"}
LONGEST_NAME = 200  # bytes between two slashes: file systems take 255, temporary names are longer than the name


class Resources(Config):
    """The resources that a stage has to itself while it runs."""

    cpus: int | None = Field(None, ge=1, description="threads; default: the cores, divided by the stages at once")
    gpus: int | None = Field(
        None, ge=0, description="GPUs; default: one for a stage that runs a network, where there is one"
    )


class StageFile(Config):
    """One stage of a pipeline file."""

    command: str = Field(description="a gemma2 command that writes an output: sft, merge slerp, ...")
    options: dict[str, Any] = Field(default_factory=dict, description="its options; ${STAGE.out} is another's output")
    matrix: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="lists of values: one copy of the stage for every combination"
    )
    after: tuple[str, ...] = Field((), description="stages that must be done first, besides those that options name")
    when: str | None = Field(None, description="run only if this holds: ${STAGE.summary.KEY} < 1")
    retries: int = Field(0, ge=0, le=100, description="further attempts after the process died without a clear error")
    resources: Resources = Field(Resources(), description="what it has to itself: cpus, gpus")

    @field_validator("matrix", mode="before")
    @classmethod
    def _values_are_lists(cls, value: Any) -> Any:
        for name, values in value.items() if isinstance(value, dict) else ():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"matrix.{name} is not a list of values; write [a, b]")
        return value


class PipelineFile(Config):
    """A pipeline: a DAG of commands."""

    vars: dict[str, Any] = Field(default_factory=dict, description="values that ${vars.NAME} stands for")
    resources: Resources = Field(Resources(), description="of every stage that does not say otherwise")
    stages: dict[str, StageFile] = Field(min_length=1, description="name -> stage; the name is the output's folder")
