"""What the tests of pipelines share: an executor in this process, and commands made of a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from text_model import text_of, write_text_model

from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.compile import Pipeline, compile_pipeline
from gemma2.posttrain.pipelines.decision import Choice
from gemma2.posttrain.pipelines.executors.jobs import Event, Job, Outcome, execute
from gemma2.posttrain.pipelines.run import Watcher, run_stages
from gemma2.posttrain.runs.commands import COMMANDS, Command
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import PipelineFile
from gemma2.posttrain.schemas.config import Config, validated


class Inline:
    """Runs a job where it stands. `lost`: stage -> how many times its process is lost first."""

    def __init__(self, jobs: int = 1, lost: dict[str, int] | None = None) -> None:
        self.jobs, self.lost = jobs, dict(lost or {})
        self.started: list[str] = []
        self.waiting: list[Job] = []
        self.most = 0

    def prepare(self, commands: Sequence[str]) -> None:
        self.prepared = tuple(commands)

    def cpus(self, wanted: int | None) -> int:
        return wanted or 1

    def check(self, stage: str, wanted: object) -> None:
        return None

    def has_room(self, command: str, wanted: object) -> bool:
        return len(self.waiting) < self.jobs

    def start(self, job: Job, wanted: object) -> None:
        self.started.append(job.stage)
        self.waiting.append(job)
        self.most = max(self.most, len(self.waiting))

    def poll(self, seconds: float) -> tuple[list[tuple[str, Event]], dict[str, Outcome]]:
        job = self.waiting.pop(0)
        if self.lost.get(job.stage, 0) > 0:
            self.lost[job.stage] -= 1
            return [], {job.stage: Outcome(-9, error="its process was ended by SIGKILL")}
        events: list[tuple[str, Event]] = []
        outcome = execute(job, lambda event: events.append((job.stage, event)))
        return events, {job.stage: outcome}

    def stop(self) -> None:
        self.waiting.clear()

    def close(self) -> None:
        self.stop()


@dataclass(frozen=True)
class Stub(Command):
    """A command whose body is a function of the test."""

    body: Callable[[Any, RunOptions, Any], RunResult] | None = None

    @property
    def run(self) -> Any:
        return self.body


class Making(Config):
    """Options of the command `make` of these tests."""

    model: Path | None = None
    models: tuple[Path, ...] = ()
    data: Path | None = None
    prompts: tuple[Path, ...] = ()
    value: float = 0.0
    fail: str = Field("", description="raise this: an error, a bug")


def make(config: Making, options: RunOptions, progress: Any) -> RunResult:
    """A model directory whose weights are its value and those of its parents."""
    if config.fail == "bug":
        raise ZeroDivisionError("a bug")
    if config.fail:
        from gemma2.core.errors import InputError

        raise InputError("it cannot be", config.fail)
    paths = [path for path in (config.model, *config.models) if path]
    with open_run("make", config, options) as run:
        text = "".join(text_of(path) for path in paths)
        (run.path / "config.json").write_text("{}")
        write_text_model(run.path, f"({config.value}{text})")
        return run.finish({"value": config.value, "nested": {"list": [1, config.value]}})


MAKE = Stub(Making, "none", "none", "makes", accelerated=False, body=make)


def compiled(stages: dict[str, Any], root: Path, **more: Any) -> Pipeline:
    """A pipeline from plain values."""
    return compile_pipeline(validated(PipelineFile, {"stages": stages, **more}), root)


def run(pipeline: Pipeline, executor: Inline | None = None, **choice: Any) -> dict[str, str]:
    """Run in this process; the status of every stage."""
    chosen = Choice(**choice)
    pipeline.root.mkdir(parents=True, exist_ok=True)
    plan = check_pipeline(pipeline, chosen)
    return dict(run_stages(pipeline, plan, executor or Inline(), choice=chosen, observer=Watcher()).status)


assert COMMANDS
