"""A pipeline checked whole before anything runs: names, types, files, models that fit, disk. Torch-free and quick.

options of every stage against its schema -> the checks of its command (`checks/`), where an input that another stage
makes has the properties that are promised -> what is complete, what will run -> memory, disk, time
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.hub import is_hub_id
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.checks.machine import Memory, free_disk
from gemma2.posttrain.checks.of_command import CommandChecks
from gemma2.posttrain.checks.plan import memory_problem
from gemma2.posttrain.runs.estimates import Promise, Sources, Work, estimate, matmul_rate
from gemma2.posttrain.runs.inputs import located
from gemma2.posttrain.schemas import MergeConfig
from gemma2.posttrain.schemas.config import Config

from .compile import Pipeline, Stage
from .expected_outputs import promised_by
from .freshness import Currency, currency_of, output_hash
from .references import filled
from .state import read_state

__all__ = ["Checked", "PipelinePlan", "check_pipeline"]


@dataclass(frozen=True)
class Checked:
    """One stage in its present state.

    action   skip (complete), run, continue, again (the output is of something else), perhaps (a needed stage will run
             first), left out
    why      what changed
    work     memory, disk, operations; None where nothing is known
    config   the configuration, as far as it is known
    """

    stage: Stage
    action: str
    why: tuple[str, ...] = ()
    work: Work | None = None
    hash: str | None = None
    config: Config | None = None


@dataclass(frozen=True)
class PipelinePlan:
    """The whole pipeline in its present state, in the order of its needs."""

    stages: Mapping[str, Checked]
    disk_free: float = 0.0
    warnings: tuple[str, ...] = field(default_factory=tuple)

    @property
    def disk(self) -> float:
        """Bytes that the stages to run will write, as far as that is known."""
        return sum(one.work.disk for one in self.to_run if one.work and math.isfinite(one.work.disk))

    @property
    def problems(self) -> list[str]:
        """What does not fit on this machine, a line each."""
        if self.disk <= self.disk_free:
            return []
        needed, free = sizes_apart(self.disk, self.disk_free)
        what = f"disk: the stages to run need about {needed}, {free} are free"
        return [f"{what}; free some space, or choose another --out"]

    def without_memory(self, memory: Memory) -> list[str]:
        """The stages to run that need more memory than this, a line each; on a cluster other machines count."""
        found = [
            (one.stage.name, memory_problem(one.config, one.work, memory))
            for one in self.to_run
            if one.work is not None and one.config is not None
        ]
        return [f"stages.{name}: {problem}" for name, problem in found if problem]

    @property
    def to_run(self) -> list[Checked]:
        """The stages that are chosen and not complete."""
        return [one for one in self.stages.values() if one.action not in ("skip", "left out")]

    def rows(self) -> list[JsonObject]:
        """A table: stage, command, what will be done, memory and disk in GiB, CPU seconds at least."""
        rate = matmul_rate() if any(one.work and one.work.operations for one in self.to_run) else 1.0
        return [_row(one, rate) for one in self.stages.values()]


def _row(one: Checked, rate: float) -> JsonObject:
    work = one.work if one.action not in ("skip", "left out") else None

    def figure(value: float | None, unit: float) -> float | None:
        return None if value is None or not math.isfinite(value) else float(f"{value / unit:.3g}")

    return {
        "stage": one.stage.name,
        "command": one.stage.command,
        "action": one.action,
        "memory_gib": figure(work.memory if work else None, 2.0**30),
        "disk_gib": figure(work.disk if work else None, 2.0**30),
        "cpu_seconds_at_least": figure(work.operations if work else None, rate),
        "why": "; ".join(one.why),
    }


def check_pipeline(
    pipeline: Pipeline,
    within: frozenset[str] | None = None,
    force: frozenset[str] = frozenset(),
    contents: bool = True,
) -> PipelinePlan:
    """Check every stage and say what a run would do.

    contents  also read rows and import the functions of the stages that will run

    Raises UsageError or InputError naming stage and key for anything that would fail later and can be known before.
    """
    promised: dict[Path, Promise] = {}
    sources = Sources(promised, places := [stage.out for stage in pipeline.stages.values()])
    checks = CommandChecks(sources)
    recorded = (read_state(pipeline.root) or {"stages": {}})["stages"] if within is not None else {}
    dropped = frozenset(name for name, one in recorded.items() if one.get("status") == "not needed")
    found: dict[str, Checked] = {}
    for stage in pipeline.stages.values():
        config = _configured(stage)
        if config is None:  # the result of another stage decides it
            promised[stage.out] = Promise(stage.kind.makes)
            found[stage.name] = Checked(stage, "perhaps" if stage.when else "run")
            continue
        with stage.located():
            config = located(config, places)
            check_merge(config, places)
            models = checks.inputs(config)
        promised |= dict(promised_by(stage, config, sources))
        if within is not None and stage.name in within:
            _check_taken(stage, found, within | dropped)
        standing = _stand(stage, config, found, within, force)
        if contents and standing.action not in ("skip", "left out"):
            with stage.located():
                checks.contents(config, models)
        found[stage.name] = replace(standing, work=estimate(config, sources), config=config)
    return PipelinePlan(found, free_disk(pipeline.root))


def check_merge(config: Config, promised: Sequence[Path]) -> None:
    """Refuse options that a merge method does not take, and missing models."""
    if not isinstance(config, MergeConfig):
        return
    config.recorded()  # raises what the engine would
    for path in [*config.models, *([config.base] if config.base else [])]:
        # MODEL+ADAPTER names two directories, and a hub id none here; the engine distinguishes them.
        elsewhere = path.exists() or "+" in str(path) or is_hub_id(path)
        if not elsewhere and not any(path.is_relative_to(place) for place in promised):
            raise InputError(f"{path} is not a directory", "give the path of a model directory")


def _configured(stage: Stage) -> Config | None:
    """The configuration as far as it is known; None if a required option comes from the result of another stage."""
    deferred = stage.deferred
    known = {key: filled(value) for key, value in stage.options.items() if key not in deferred}
    if not deferred:
        return stage.config(known)
    try:
        return stage.config(known)
    except UsageError as error:
        cause = error.__cause__
        problems = cause.errors() if isinstance(cause, ValidationError) else []
        own = [one for one in problems if one["loc"] and one["loc"][0] not in deferred]
        if own or not problems:
            raise
        return None


def _stand(
    stage: Stage,
    config: Config,
    before: Mapping[str, Checked],
    within: frozenset[str] | None,
    force: frozenset[str],
) -> Checked:
    """The action that a run would take on a stage."""
    if within is not None and stage.name not in within:
        return Checked(stage, "skip" if is_complete(stage.out) else "left out")
    if stage.name in force:
        return Checked(stage, "again", ("--force",))
    waits = [name for name in stage.needs if before[name].action != "skip"]
    currency = (
        Currency("missing") if waits and not stage.out.exists() else currency_of(stage.command, config, stage.out)
    )
    if currency.state == "complete" and not stage.deferred:
        if waits:
            return Checked(stage, "perhaps", (f"after {', '.join(waits)}",))
        manifest = read_manifest(stage.out)
        return Checked(stage, "skip", hash=output_hash(manifest) if manifest else None)
    action = {"missing": "run", "interrupted": "continue", "changed": "again"}.get(currency.state, "perhaps")
    return Checked(stage, "perhaps" if stage.when and action == "run" else action, currency.why)


def is_complete(out: Path) -> bool:
    """Whether an output exists, whatever it was made from."""
    return (read_manifest(out) or {}).get("status") == "complete"


def _check_taken(stage: Stage, before: Mapping[str, Checked], apart: frozenset[str]) -> None:
    """Refuse a chosen stage whose input is missing, unless a chosen stage makes it or nothing needs it."""
    for name in stage.needs:
        if name not in apart and before[name].action == "left out":
            raise InputError(f"stages.{stage.name} needs {name}, which is neither complete nor chosen", "run that too")
