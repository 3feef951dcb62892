"""Pipeline files: stages with a command and its options, which may refer to the outputs of other stages."""

from __future__ import annotations

from pydantic import Field, PrivateAttr, field_validator

from gemma2.core.json_files import JsonObject

from .config import Config, ValueSource

__all__ = ["PipelineFile", "Resources", "StageFile"]

STAGE_NAME = r"^[A-Za-z0-9][\w.=-]*(/[A-Za-z0-9][\w.=-]*)*$"
# Sections of the file, prefixes of references, and the files that a pipeline's folder holds besides the stages.
RESERVED = frozenset({"vars", "resources", "stages", "matrix", "logs"})
RESERVED |= {"pipeline.json", "pipeline.yaml", "gemma2.json", "summary.json", "report.html"}
LAUNCHED = ("gpus", "nodes")  # options of a command that the resources of its stage give
LONGEST_NAME = 200  # bytes between two slashes: file systems take 255, temporary names are longer than the name


class Resources(Config):
    """Resources that are reserved for a stage while it runs."""

    cpus: int | None = Field(None, ge=1, description="threads; default: cores / stages that run at the same time")
    gpus: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="GPUs of each machine, a process on each; default: one where a network runs, if there is any",
    )
    nodes: int | None = Field(None, ge=1, le=1024, description="machines; default: one")

    @property
    def is_gang(self) -> bool:
        """Whether several processes run the stage together."""
        return (self.gpus or 1) > 1 or (self.nodes or 1) > 1


class StageFile(Config):
    """One stage of a pipeline file."""

    command: str = Field(description="a gemma2 command that writes an output: sft, merge slerp, ...")
    options: JsonObject = Field(
        default_factory=dict, description="options of the command; ${STAGE.out} is the output of another stage"
    )
    matrix: dict[str, tuple[object, ...]] = Field(
        default_factory=dict, description="lists of values: one copy of the stage for every combination"
    )
    after: tuple[str, ...] = Field((), description="stages that must be done first, besides those named in options")
    when: str | None = Field(None, description="run only if this condition holds: ${STAGE.summary.KEY} < 1")
    retries: int = Field(0, ge=0, le=100, description="further attempts if the process dies without a clear error")
    resources: Resources = Field(Resources(), description="reserved resources: cpus, gpus, nodes")

    @field_validator("matrix", mode="before")
    @classmethod
    def _values_are_lists(cls, value: object) -> object:
        for name, values in value.items() if isinstance(value, dict) else ():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"matrix.{name} is not a list of values; write [a, b]")
        return value


class PipelineFile(Config):
    """A pipeline: a DAG of commands. `source`: the file and --set that it is from, for messages."""

    _source: ValueSource = PrivateAttr(default_factory=ValueSource)

    vars: JsonObject = Field(default_factory=dict, description="values of ${vars.NAME}")
    resources: Resources = Field(Resources(), description="default resources of the stages")
    stages: dict[str, StageFile] = Field(min_length=1, description="name -> stage; the name is the output's folder")

    @property
    def source(self) -> ValueSource:
        """The file and the --set that the pipeline is from."""
        return self._source

    def read_from(self, source: ValueSource) -> PipelineFile:
        """The pipeline, with the place of its values for messages."""
        self._source = source
        return self
