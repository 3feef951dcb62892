"""Runs the stages of a pipeline: what is missing or changed, in the order of their needs, several at once.

A stage runs when all that it needs is done; what becomes of it then, `decision.py` says.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gemma2.core.errors import Gemma2Error, refusal
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import now, read_manifest
from gemma2.core.outputs.promised import fault_of
from gemma2.core.outputs.staging import partial_path
from gemma2.core.permissions import permissions
from gemma2.core.progress import Progress, Task
from gemma2.posttrain.provenance.output_state import can_go_on
from gemma2.posttrain.runs.commands import output_hash, spell
from gemma2.posttrain.runs.finished import tidy
from gemma2.posttrain.runs.way_on import in_a_pipeline
from gemma2.posttrain.schemas import Resources
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.pipeline import LAUNCHED

from .compile import Pipeline, Stage, with_method
from .decision import Choice, Decision, decide, outside, prospect
from .executors.jobs import Event, Job, Outcome
from .shelf import take
from .state import State

__all__ = ["Choice", "Executor", "Observer", "Scheduler", "StageFailed", "job_of"]

POLL = 0.5  # seconds


class Executor(Protocol):
    """The interface of an executor: it runs jobs."""

    def prepare(self, commands: Sequence[str]) -> None: ...
    def cpus(self, wanted: int | None) -> int: ...
    def check(self, stage: str, wanted: Resources) -> None: ...
    def has_room(self, command: str, wanted: Resources) -> bool: ...
    def start(self, job: Job, wanted: Resources) -> None: ...
    def poll(self, seconds: float) -> tuple[list[tuple[str, Event]], dict[str, Outcome]]: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """An observer of the run: the command line, or nobody."""

    def started(self, stage: Stage, command: str, why: str) -> None: ...
    def finished(self, stage: Stage, status: str, seconds: float, summary: JsonMapping) -> None: ...


class StageFailed(Gemma2Error):
    """A stage ended with an expected failure; the exit code is the stage's."""

    # The defaults let pickle rebuild the error from its message alone; it then restores the attributes.
    def __init__(self, what: str, hint: str = "", code: int = 1) -> None:
        super().__init__(what, hint)
        self.exit_code = code


@dataclass
class Scheduler:
    """One run of a pipeline.

    commands  that will run, as far as is known: their libraries are imported beforehand
    status    what became of each stage so far
    """

    pipeline: Pipeline
    executor: Executor
    choice: Choice
    observer: Observer
    progress: Progress
    commands: Sequence[str] = ()
    status: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, Decision] = field(default_factory=dict)
    bars: dict[tuple[str, int], Any] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    prepared: bool = False

    def run(self) -> None:
        """Run until nothing is left to start and nothing runs.

        Raises StageFailed for the first stage that failed, RuntimeError with its traceback when that was a bug.
        """
        self.state = State(self.pipeline, self.choice.within)
        self.status = outside(self.pipeline, self.choice, self.state.document["stages"])
        try:
            self.state.write()
            # The outermost bar holds the display, so that those of stages may end in any order.
            with self.progress.task("pipeline", total=len(self.pipeline.stages), unit="stages") as bar:
                self._until_done(bar)
                if "failed" in self.status.values():
                    raise _SomeFailed  # ends the bar as one that did not get through
        except _SomeFailed:
            pass
        except BaseException:
            self.executor.stop()
            self.state.finish("interrupted")
            raise
        failed = [name for name, status in self.status.items() if status == "failed"]
        for name in self.pipeline.stages.keys() - self.status.keys():
            self.state.set(name, status="blocked")
        self.state.finish("failed" if failed else "complete")
        if failed:
            self._raise(failed)

    def _until_done(self, bar: Task) -> None:
        shown = 0
        while (moved := self._begin()) or self.started:
            bar.advance(len(self.status) - shown)
            shown = len(self.status)
            if self.started and not moved:
                self._wait()
        bar.advance(len(self.status) - shown)  # those of the last wait
        self._close_bars()

    def _raise(self, failed: Sequence[str]) -> None:
        first = failed[0]
        outcome = self.outcomes[first]
        if outcome.traceback:
            raise RuntimeError(f"stage {first} has a bug:\n{outcome.traceback}")
        others = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        what, _, hint = outcome.error.partition("; ")
        hint = in_a_pipeline(hint)
        log = self.pipeline.root / "logs" / f"{first}.log"
        code = outcome.code if outcome.code > 0 else 1
        raise StageFailed(f"stage {first}: {what}{others}", f"{hint + '; ' if hint else ''}its log is {log}", code)

    # --- starting -----------------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Settle or start every stage that can be. True when something was settled or started."""
        moved = False
        failing = "failed" in self.status.values() and not self.choice.keep_going
        for stage in self.pipeline.stages.values():
            if stage.name in self.status or stage.name in self.started:
                continue
            if any(self.status.get(name) in ("failed", "blocked") for name in stage.needs):
                self._settle(stage, "blocked")
                moved = True
            elif all(self.status.get(name) in ("complete", "not needed") for name in stage.needs):
                moved = self._consider(stage, failing) or moved
        return moved

    def _consider(self, stage: Stage, failing: bool) -> bool:
        """Skip, drop or start a stage whose needs are done. False when it has to wait for room."""
        found = self.waiting.get(stage.name)
        if found is None:
            try:
                found = decide(prospect(stage, self.pipeline, self.status), self.pipeline, self.choice, self.status)
            except Gemma2Error as error:
                self.outcomes[stage.name] = Outcome(error.exit_code, error=str(error))
                self._settle(stage, "failed", error=str(error), exit_code=error.exit_code)
                return True
            self.waiting[stage.name] = found
        if found.action == "not needed":
            self._settle(stage, "not needed")
            return True
        if found.action == "skip":
            tidy(stage.out)
            self._settle(stage, "complete", hash=_hash_of(stage))
            return True
        if found.action == "reuse":
            return self._reuse(found)
        if failing or not self.executor.has_room(stage.command, stage.resources):
            return False
        self._start(found)
        return True

    def _reuse(self, found: Decision) -> bool:
        """Link an output that stands for the stage."""
        stage = found.stage
        assert found.config is not None and found.source is not None
        self.observer.started(stage, f"reused from {found.source}", "; ".join(map(str, found.why)))
        started = time.monotonic()
        try:
            summary = take(found.source, stage.command, found.config, stage.out).get("summary") or {}
        except (OSError, Gemma2Error) as error:  # the disk is full, or somebody else writes there
            line = str(error) if isinstance(error, Gemma2Error) else refusal(error) or str(error)
            self.outcomes[stage.name] = Outcome(1, error=line)
            self._settle(stage, "failed", error=line, exit_code=1)
            return True
        self._settle(stage, "complete", hash=_hash_of(stage))
        self.observer.finished(stage, "complete", time.monotonic() - started, summary)
        return True

    def _start(self, found: Decision) -> None:
        stage = found.stage
        assert found.config is not None
        if not self.prepared:
            self.executor.prepare(self.commands)
            self.prepared = True
        attempts = self.tries[stage.name] = self.tries.get(stage.name, 0) + 1
        resume = found.action == "continue"
        job = replace(
            job_of(stage, self.pipeline, self.executor),
            options=with_method(stage.command, _located_options(found)),
            resume=resume,
            # Leftovers of an interrupted run of something else do not stop this one.
            force=stage.out.exists() or (not resume and partial_path(stage.out).exists()),
        )
        why = "; ".join([*(["goes on where it was"] if resume else map(str, found.why)), *found.notes])
        self.observer.started(stage, spell(stage.command, _launched(stage, found.config), stage.out), why)
        self.started[stage.name] = time.monotonic()
        self.state.set(stage.name, status="running", started=now(), ended=None, attempts=attempts, exit_code=None)
        self.executor.start(job, stage.resources)

    # --- ending -------------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        events, ended = self.executor.poll(POLL)
        for stage, event in events:
            self._show(stage, event)
        for name, outcome in ended.items():
            self._end(self.pipeline.stages[name], outcome)

    def _end(self, stage: Stage, outcome: Outcome) -> None:
        seconds = time.monotonic() - self.started.pop(stage.name)
        found = self.waiting.pop(stage.name)
        self._close_bars(stage.name)
        tries = self.tries[stage.name]
        if outcome.code < 0 and tries <= stage.retries:
            self.progress.warn(f"stage {stage.name}: {outcome.error}; attempt {tries + 1} of {stage.retries + 1}")
            assert found.config is not None
            if can_go_on(stage.command, found.config, stage.out):
                found = replace(found, action="continue")
            self.state.set(stage.name, status="waiting")
            self.waiting[stage.name] = found
            return
        fault = fault_of(stage.out) if outcome.code == 0 else ""
        if fault:  # whatever its process says
            outcome = Outcome(1, error=f"it came to its end, and its output {stage.out} {fault}; run it again")
        self.outcomes[stage.name] = outcome
        record = {"ended": now(), "seconds": round(seconds, 2), "exit_code": outcome.code}
        if outcome.code == 0:
            self._settle(stage, "complete", **record, hash=_hash_of(stage))
        else:
            line = outcome.error or outcome.traceback.strip().rpartition("\n")[2]
            self._settle(stage, "failed", **record, error=line)
        self.observer.finished(stage, self.status[stage.name], seconds, outcome.summary or {})

    def _settle(self, stage: Stage, status: str, **record: object) -> None:
        self.status[stage.name] = status
        self.waiting.pop(stage.name, None)
        self.state.set(stage.name, status=status, **record)

    # --- progress -----------------------------------------------------------------------------------------------------

    def _show(self, stage: str, event: Event) -> None:
        """Show the progress of a stage. If several run at once, its bars carry its name."""
        kind, *rest = event
        label = f"{self._short(stage)}: " if len(self.started) > 1 else ""
        if kind == "task":
            number, name, total, unit = rest
            context = self.progress.task(f"{label}{name}", total, unit)
            self.bars[stage, number] = (context, context.__enter__())
        elif kind == "advance":
            number, amount, fields = rest
            if (stage, number) in self.bars:
                self.bars[stage, number][1].advance(amount, **fields)
        elif kind == "end":
            self._close_bars(stage, rest[0])
        elif kind == "warn":
            self.progress.warn(f"{label}{rest[0]}")
        else:
            self.progress.note(f"{label}{rest[0]}")

    def _short(self, stage: str) -> str:
        """The last folders of a stage's name, as many as tell it from the other stages."""
        parts = stage.split("/")
        tails = ("/".join(parts[-depth:]) for depth in range(1, len(parts) + 1))
        others = [name for name in self.pipeline.stages if name != stage]
        return next((t for t in tails if not any(o == t or o.endswith(f"/{t}") for o in others)), stage)

    def _close_bars(self, stage: str | None = None, number: int | None = None) -> None:
        for key in [*self.bars]:
            if stage in (None, key[0]) and number in (None, key[1]):
                self.bars.pop(key)[0].__exit__(None, None, None)


def job_of(stage: Stage, pipeline: Pipeline, executor: Executor) -> Job:
    """The job of a stage that begins anew, with its options as the file has them."""
    return Job(
        stage=stage.name,
        command=stage.command,
        options=stage.options,
        out=str(stage.out),
        log=str(pipeline.root / "logs" / f"{stage.name}.log"),
        resume=False,
        force=False,
        folder=os.getcwd(),
        modules=tuple(sys.path),
        cpus=executor.cpus(stage.resources.cpus),
        permissions=permissions(),
        processes=stage.resources.gpus or 1,
        nodes=stage.resources.nodes or 1,
    )


def _launched(stage: Stage, config: Config) -> Config:
    """The configuration with the GPUs and machines of a gang, as its command line has them."""
    reserved = stage.resources
    return config.model_copy(
        update=reserved.model_dump(include={*LAUNCHED}, exclude_none=True) if reserved.is_gang else {}
    )


class _SomeFailed(Exception):
    """Stages have failed, and nothing is left that could run."""


def _located_options(found: Decision) -> JsonObject:
    """Options as plain values, with hub ids as the directories that they were found in."""
    assert found.config is not None
    dumped = found.config.model_dump(mode="json")
    return {key: dumped.get(key, value) for key, value in found.options.items()}


def _hash_of(stage: Stage) -> str | None:
    manifest = read_manifest(stage.out)
    return output_hash(manifest) if manifest else None
