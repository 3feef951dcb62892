"""`gemma2 pipeline run | status`: a pipeline's folder, which grows in the open, and its state. Torch-free.

    OUT/STAGE/       the output of every stage, each complete or missing
    OUT/logs/        what stages wrote to stdout and stderr
    OUT/pipeline.yaml   what runs here, with every --set
    OUT/pipeline.json   where every stage is
    OUT/gemma2.json     when all is done: the file, its variables, the hashes

Started again, a pipeline goes on where it was: there is no --resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError, OutputError
from gemma2.core.json_files import JsonMapping, JsonObject, write_json
from gemma2.core.outputs.manifest import MANIFEST, SCHEMA_VERSION, Manifest, now, read_manifest, versions
from gemma2.core.outputs.staging import check_output, locked
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.checks.merging_gain import measured_angle
from gemma2.posttrain.runs.finished import tidy
from gemma2.posttrain.schemas.config import to_yaml

from .check import Checked, PipelinePlan, check_pipeline, look_at_pipeline
from .compile import Pipeline, Stage
from .decision import Choice
from .executors.processes import LocalExecutor
from .scheduler import Executor, Observer, Scheduler, job_of
from .state import STATE_FILE, is_running, read_state, recorded_stages
from .warp_stages import FIRST_MERGE

__all__ = [
    "FILE",
    "PipelineResult",
    "Watcher",
    "check_executor",
    "check_place",
    "executor_of",
    "run_pipeline",
    "run_stages",
    "scripts_of",
    "status_rows",
]

FILE = "pipeline.yaml"
ASIDE = f".{FILE}.tmp"  # all that a kill leaves before the first stage


class Watcher:
    """Watches nothing: the default observer."""

    def started(self, stage: Stage, command: str, why: str) -> None:
        return None

    def finished(self, stage: Stage, status: str, seconds: float, summary: JsonMapping) -> None:
        return None


@dataclass(frozen=True)
class _Angles:
    """Another observer, and the angle between the policies as soon as a WARP run has merged for the first time."""

    observer: Observer
    pipeline: Pipeline
    progress: Progress

    def started(self, stage: Stage, command: str, why: str) -> None:
        self.observer.started(stage, command, why)

    def finished(self, stage: Stage, status: str, seconds: float, summary: JsonMapping) -> None:
        self.observer.finished(stage, status, seconds, summary)
        prefix = stage.name.removesuffix(FIRST_MERGE)
        config = self.pipeline.warps.get(prefix) if stage.name.endswith(FIRST_MERGE) else None
        found = measured_angle(config, summary) if config is not None and status == "complete" else None
        if found is not None and config is not None:
            self.progress.note(f"{stage.name}: {found.statement()}")
            warning = found.warning(config)
            if warning:
                self.progress.warn(f"{stage.name}: {warning}")


@dataclass(frozen=True)
class PipelineResult:
    """The result of a run: stage -> complete, not needed, failed or blocked; and which of them it ran."""

    status: Mapping[str, str]
    ran: tuple[str, ...]


def executor_of(
    name: str,
    jobs: int,
    ray_address: str | None = None,
    slurm: Sequence[str] = (),
    gpus: tuple[str, ...] | None = None,
) -> Executor:
    """The executor of this name.

    slurm  settings of sbatch, KEY=VALUE
    gpus   of this machine, as CUDA_VISIBLE_DEVICES calls them; default: all that are visible
    """
    if name == "slurm":
        from .executors.slurm import SlurmExecutor

        return SlurmExecutor(jobs, slurm)
    if name == "ray":
        from .executors.cluster import RayExecutor

        return RayExecutor(jobs, ray_address)
    return LocalExecutor(jobs, gpus)


def run_pipeline(
    pipeline: Pipeline,
    executor: Executor,
    *,
    choice: Choice | None = None,
    observer: Observer | None = None,
    progress: Progress = SILENT,
) -> PipelineResult:
    """Check the pipeline, run what is missing or changed, and record it.

    Raises UsageError or InputError before anything runs, StageFailed for a stage that failed, OutputError for a folder
    that is not a pipeline's.
    """
    root = pipeline.root
    choice = choice or Choice()
    check_place(root)
    check_executor(pipeline, executor)
    plan = check_pipeline(pipeline, choice)
    for problem in plan.problems:
        what, _, hint = problem.partition("; ")
        raise InputError(f"{root}: {what}", hint)
    for name, command, place in leftover_outputs(pipeline):
        progress.note(f"{place} ({command}) is the output of no stage of this file: {name} was renamed or dropped")
    with locked(root):
        started = now()
        recorded = _manifest_of(root)
        same_file = recorded is not None and recorded.get("config") == recorded_file(pipeline)
        if plan.is_done and same_file and pipeline.stages.keys() <= recorded_stages(root).keys():
            for note in plan.kept_with_other_versions():
                progress.note(note)
            for name, stage in pipeline.stages.items():
                if plan.stages[name].action == "skip":
                    tidy(stage.out)
            words = {"skip": "complete", "not needed": "not needed"}
            return PipelineResult({name: words[one.action] for name, one in plan.stages.items()}, ())
        root.mkdir(exist_ok=True)
        (root / MANIFEST).unlink(missing_ok=True)  # its content is about to change
        _write_file(pipeline)
        result = run_stages(pipeline, plan, executor, choice=choice, observer=observer, progress=progress)
        if choice.within is None:
            write_json(root / MANIFEST, _manifest(pipeline, started))
        return result


def run_stages(
    pipeline: Pipeline,
    plan: PipelinePlan,
    executor: Executor,
    *,
    choice: Choice | None = None,
    observer: Observer | None = None,
    progress: Progress = SILENT,
) -> PipelineResult:
    """Run what is missing or changed in a folder that the caller holds; `plan` is what its check gave."""
    check_executor(pipeline, executor)
    for note in plan.kept_with_other_versions():
        progress.note(note)
    for line in plan.warnings:
        progress.warn(line)
    commands = tuple(dict.fromkeys(one.stage.command for one in plan.to_run))
    watched = _Angles(observer or Watcher(), pipeline, progress)
    scheduler = Scheduler(pipeline, executor, choice or Choice(), watched, progress, commands)
    try:
        scheduler.run()
    finally:
        executor.close()
    chosen = scheduler.choice.within
    status = {name: one for name, one in scheduler.status.items() if chosen is None or name in chosen}
    return PipelineResult(status, tuple(scheduler.outcomes))


def check_executor(pipeline: Pipeline, executor: Executor) -> None:
    """Refuse resources that the executor can never provide."""
    for stage in pipeline.stages.values():
        executor.check(stage.name, stage.resources)


def scripts_of(executor: Executor, stages: Sequence[Stage], pipeline: Pipeline) -> dict[str, str]:
    """The batch scripts of stages, where the executor submits them; else none."""
    from .executors.slurm import SlurmExecutor

    if not isinstance(executor, SlurmExecutor):
        return {}
    return {one.name: executor.script(job_of(one, pipeline, executor), one.resources) for one in stages}


def check_place(root: Path) -> None:
    """Refuse a folder that holds something else: a pipeline grows in the open and would mix with it."""
    check_output(root, force=True, marks=(MANIFEST, STATE_FILE, FILE, ASIDE))
    if (_manifest_of(root) or {}).get("command", "pipeline") != "pipeline":
        raise OutputError(f"--out {root} is the output of another command", "choose another --out")


def _manifest_of(root: Path) -> Manifest | None:
    """The manifest of a pipeline's folder; None also where it was cut: the run writes it again."""
    try:
        return read_manifest(root)
    except InputError:
        return None


def recorded_file(pipeline: Pipeline) -> JsonObject:
    """The pipeline as a file that runs it again."""
    return pipeline.file.model_dump(mode="json", exclude_defaults=True)


def _write_file(pipeline: Pipeline) -> None:
    """The pipeline that runs here, as a file: `gemma2 pipeline status OUT` reads it."""
    path = pipeline.root / FILE
    aside = path.with_name(ASIDE)
    aside.write_text(to_yaml(recorded_file(pipeline)), encoding="utf-8")
    aside.replace(path)


def _manifest(pipeline: Pipeline, started: str) -> JsonObject:
    state = recorded_stages(pipeline.root)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "pipeline",
        "config": recorded_file(pipeline),
        "parents": [],
        "data": [],
        "versions": versions(),
        "started": started,
        "ended": now(),
        "status": "complete",
        "summary": {
            "stages": {
                name: {key: one.get(key) for key in ("command", "status", "hash")} for name, one in state.items()
            }
        },
        "files": {},
    }


WORDS = {
    **{"skip": "complete", "run": "to run", "again": "changed", "continue": "interrupted", "perhaps": "to be seen"},
    "reuse": "to run",
    "left out": "to run",
}


def status_rows(pipeline: Pipeline) -> list[JsonObject]:
    """The state of every stage: on disk, and as the last run recorded it. Never refuses."""
    state, notes = recorded_stages(pipeline.root), []
    try:
        read_state(pipeline.root)
    except InputError as error:
        notes = [error.what]
    alive = is_running(pipeline.root)
    rows = [_status_row(one, state.get(name, {}), alive) for name, one in look_at_pipeline(pipeline).items()]
    return [*rows, *_without_a_stage(pipeline), *({**NO_ROW, "note": note} for note in notes)]


NO_ROW: JsonObject = dict.fromkeys(("stage", "command", "status", "seconds", "hash", "note"))


def _status_row(one: Checked, last: JsonMapping, alive: bool) -> JsonObject:
    recorded = last.get("status")
    # A pipeline that was killed leaves "running" behind; what is not needed is decided anew where it can be.
    shown_states = ("failed", "blocked", *(("running",) if alive else ()))
    shown = recorded if one.runs and recorded in shown_states else None
    digest = (one.hash or "").rpartition(":")[2][:10]
    return {
        "stage": one.stage.name,
        "command": one.stage.command,
        "status": shown or WORDS.get(one.action, one.action),
        "seconds": last.get("seconds"),
        "hash": digest or None,
        "note": "; ".join([*([last["error"]] if shown == "failed" and last.get("error") else []), *one.why]) or None,
    }


def _without_a_stage(pipeline: Pipeline) -> list[JsonObject]:
    """Rows about the outputs in the folder that no stage of the file makes: of a stage that was renamed or dropped."""
    return [
        {**NO_ROW, "stage": name, "command": command, "status": "of no stage", "note": f"remove or keep {place}"}
        for name, command, place in leftover_outputs(pipeline)
    ]


def leftover_outputs(pipeline: Pipeline) -> list[tuple[str, str, Path]]:
    """Name, command and directory of every output below the folder of a pipeline that no stage of its file makes."""
    known = {stage.out.absolute() for stage in pipeline.stages.values()}
    found: list[tuple[str, str, Path]] = []
    waiting = [pipeline.root]
    while waiting:
        folder = waiting.pop()
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.startswith(".") or path.is_symlink() or not path.is_dir() or path.absolute() in known:
                continue
            try:
                manifest = read_manifest(path)
            except InputError:
                continue
            if manifest is None:
                waiting.append(path)
            else:
                found.append((path.relative_to(pipeline.root).as_posix(), str(manifest.get("command")), path))
    return sorted(found)
