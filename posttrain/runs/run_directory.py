"""Run directories of the training steps: manifest, metrics, samples, checkpoints, resume. Torch-free.

A run works in a hidden sibling of `--out` (`.NAME.partial`), which is renamed to `--out` when the run is complete, so
that `--out` exists only as a result. An interrupted run leaves the partial directory for `--resume`, which is refused
if configuration, inputs or data have changed. `--force` builds next to an existing output and replaces it at the end;
`--force --resume` continues such a run.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import Gemma2Error, InputError, OutputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject, finite, parse_json, write_json
from gemma2.core.outputs.manifest import (
    CHECKPOINTS,
    MANIFEST,
    STATE,
    now,
    read_manifest,
    read_state,
    remove_temporaries,
    require_complete,
    write_manifest,
)
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.outputs.staging import (
    add_note,
    check_output,
    check_partial,
    locked,
    partial_path,
    publish,
    remove_tokens,
)
from gemma2.core.permissions import versions_allowed
from gemma2.core.ranks import ALONE, Ranks, announced
from gemma2.posttrain.provenance.change import Change
from gemma2.posttrain.provenance.named_inputs import EVALUATIONS, named_inputs
from gemma2.posttrain.provenance.origin import origin_of
from gemma2.posttrain.provenance.recorded_files import check_weights
from gemma2.posttrain.provenance.version_rule import continued, goes_on_with, kept_apart, made_with, way_on
from gemma2.posttrain.schemas.config import Config

from .accelerator import accelerator_stack, precision_of
from .live import clear_live
from .memory_shortage import MemoryRecord, out_of_memory
from .run_options import RunOptions, RunResult
from .together import goes_on_with_any_number, processes_by_step
from .way_on import with_way_on

__all__ = ["EVALUATIONS", "Parent", "Run", "RunOptions", "RunResult", "open_run", "remove_resume_state", "resumed_with"]

# A complete run that was not moved yet, a checkpoint, finished rows, a finished stage of WARP, an interrupted stage,
# or the log of a failed one.
SHARDED = "fsdp"  # the strategy whose checkpoints any number of processes can read
BEFORE = "processes_before"  # of a record while a run goes on with another number of them
BY_STEP = "processes_by_step"  # of a record: "2, from step 4: 1"
KEPT = (MANIFEST, f"{CHECKPOINTS}/*", "data.jsonl", f"*/*/{MANIFEST}", "*/.*.partial", "logs/*")


@dataclass(frozen=True)
class Parent:
    """A model directory that a result is made from. `role` is the name of the flag: model, policy, reward, ..."""

    role: str
    path: Path


class Run:
    """One run of one command, open for writing. Made by `open_run`. With several processes only rank 0 writes."""

    def __init__(
        self, command: str, path: Path, options: RunOptions, origin: JsonObject, resumed: bool, ranks: Ranks = ALONE
    ) -> None:
        self.command = command
        self.ranks = ranks
        self.path = path
        self.options = options
        self.origin = origin
        self.resumed = resumed
        self.result: RunResult | None = None
        self.phase = ""  # for an error that no step names: "step 7 of RL"
        self.memory = MemoryRecord()  # for the error of memory that is exhausted
        self.listeners: list[Callable[[int, JsonMapping], None]] = []  # called for every line of metrics.jsonl

    @property
    def checkpoints(self) -> Path:
        """Directory of the resume state; removed at the end."""
        return self.path / CHECKPOINTS

    def goes_on_at(self, step: int) -> None:
        """Record, for the manifest, with how many processes a resumed run computes its steps from `step` on.

        step  of the checkpoint that it goes on from; 0 where it has none and begins again
        """
        self.ranks.on_main(lambda: self._note_processes(step))

    def _note_processes(self, step: int) -> None:
        before, now_many = self.origin.pop(BEFORE, None), self.origin.get("processes", 1)
        said = self.origin.pop(BY_STEP, None)
        if line := processes_by_step(str(said or before or now_many), step, now_many):
            self.origin[BY_STEP] = line
        if before is not None or self.origin.get(BY_STEP) != said:
            write_json(self.path / STATE, self.origin)

    def log(self, step: int, **metrics: object) -> None:
        """Append one line to metrics.jsonl."""
        if not self.ranks.is_main:
            return
        self._append("metrics.jsonl", {"step": step, **metrics})
        for listener in self.listeners:
            listener(step, metrics)

    def sample(self, step: int, **row: object) -> None:
        """Append one prompt and completion of the run to samples.jsonl."""
        if self.ranks.is_main:
            self._append("samples.jsonl", {"step": step, **row})

    def evaluated(self, step: int, **row: object) -> None:
        """Append the values per prompt of an evaluation to evaluations.jsonl; NaN becomes null."""
        if self.ranks.is_main:
            self._append(EVALUATIONS, {"step": step, **row})

    def _append(self, name: str, row: Mapping[str, object]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, for a run that continues from an older checkpoint, and a torn last line."""
        if not self.ranks.is_main:
            return
        for name in ("metrics.jsonl", "samples.jsonl", EVALUATIONS):
            path = self.path / name
            if path.exists():
                # Bytes: a torn line may end inside a character, and text splits at more than the newline.
                kept = [line + b"\n" for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
                aside = path.with_name(f".{name}.tmp")
                aside.write_bytes(b"".join(kept))
                aside.replace(path)

    def finish(self, summary: JsonMapping) -> RunResult:
        """Write the manifest, move the directory to its place and remove the resume state.

        The state is removed after the move: a kill before it is followed by a resume, or by a start that publishes what
        is complete (finished.py).
        """
        self.ranks.on_main(lambda: self._publish(summary))
        self.result = RunResult(self.options.out, dict(summary))
        return self.result

    def _publish(self, summary: JsonMapping) -> None:
        manifest = {**self.origin, "ended": now(), "status": "complete", "summary": dict(summary)}
        if (self.path / "config.json").is_file() and weight_files(self.path):
            from gemma2.core.outputs.ancestry import write_card  # imports numpy, which commands without a run need not

            write_card(self.path, manifest, self.options.out)
        clear_live(self.path)
        remove_temporaries(self.path)
        write_manifest(self.path, manifest)
        publish(self.path, self.options.out, self.options.force)
        remove_resume_state(self.options.out)


def remove_resume_state(directory: Path) -> None:
    """Remove what an output needed until it was complete. The record goes last: with it the rest is found again.

    The output is complete whether this succeeds or not.
    """
    try:
        if (directory / CHECKPOINTS).exists():
            shutil.rmtree(directory / CHECKPOINTS)
        (directory / STATE).unlink(missing_ok=True)
    except OSError as error:
        add_note(
            f"{directory} is complete, but {CHECKPOINTS} and {STATE} in it could not be removed ({error.strerror}); "
            "the same command removes them"
        )


def _step_of(line: bytes) -> float:
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def hardware(config: Config) -> JsonObject:
    """The kind of machine and its accelerator, without anything that identifies it."""
    machine = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()}
    return {**machine, **accelerator_stack(config)}


def check_parents(parents: Sequence[Parent]) -> None:
    """Raise InputError for inputs that are missing, unfinished, or not model directories."""
    for parent in parents:
        if not parent.path.is_dir():
            raise InputError(f"--{parent.role} {parent.path} is not a directory", "give the path of a model directory")
        if (parent.path / "adapter_config.json").is_file() and not (parent.path / "config.json").is_file():
            raise InputError(
                f"--{parent.role} {parent.path} is a LoRA adapter, not a model",
                f"make one with gemma2 merge linear {parent.path} --out MODEL",
            )
        if (parent.path / "adapter_model.safetensors").is_file() and not (parent.path / "config.json").is_file():
            raise InputError(
                f"--{parent.role} {parent.path} holds the weights of an adapter, without its adapter_config.json",
                "give the path of a model directory",
            )
        if not (parent.path / "config.json").is_file():
            raise InputError(
                f"--{parent.role} {parent.path} holds no config.json",
                "give a directory with config.json and *.safetensors",
            )
        if not weight_files(parent.path):
            raise InputError(
                f"--{parent.role} {parent.path} holds no *.safetensors", "convert the weights with gemma2 convert"
            )
        require_complete(parent.path, f"--{parent.role}")


def check_unchanged(before: JsonMapping, start: Start, partial: Path) -> None:
    """Raise InputError if configuration, inputs, data or libraries have changed since the run began."""
    changed, allowed = kept_apart(start.command, start.config, before)
    hint = "restore that, or start over with --force"
    if spread := _spread_otherwise(before, start):
        hint = hint if changed else f"{_as_it_began(before)}, or start over with --force"
        changed += spread
    versions = [] if versions_allowed() else allowed
    if changed or versions:
        raise InputError(
            f"cannot resume {partial}: changed since it began: {', '.join(map(str, [*changed, *versions]))}",
            hint if changed else way_on("--force"),
        )


def _spread_otherwise(before: JsonMapping, start: Start) -> list[Change]:
    """What keeps a run from going on with these processes: the state of a sharded one can be read by any number."""
    processes, strategy = before.get("processes", 1), before.get("strategy", start.strategy)
    found = []
    if processes != start.processes and strategy != SHARDED and not goes_on_with_any_number(start.command):
        found.append(Change("processes", processes, start.processes, by_value=True))
    if strategy != start.strategy:
        found.append(Change("strategy", strategy, start.strategy, by_value=True))
    return found


def _as_it_began(before: JsonMapping) -> str:
    """How to start a run again so that its checkpoints fit."""
    strategy = before.get("strategy", "")
    if strategy == SHARDED:
        return f"give --strategy {SHARDED}"
    number = before.get("processes", 1)
    processes = "1 process" if number == 1 else f"{number} processes"
    return f"start it on {processes}" + (f" with --strategy {strategy}" if strategy == "ddp" else "")


def resumed_with(config: Config, out: Path) -> str:
    """Return a line about the versions with which an interrupted run may go on; empty where nothing has changed."""
    try:
        before = read_state(partial_path(out))
    except InputError:
        return ""
    return goes_on_with(str(before.get("command")), config, before)


@contextmanager
def open_run(
    command: str,
    config: Config,
    options: RunOptions,
    *,
    ranks: Ranks = ALONE,
    strategy: str = "",
) -> Iterator[Run]:
    """Open (or, with `options.resume`, continue) the run directory of one step.

    strategy  how several processes hold what they train, for the record (posttrain/launch); empty if nothing is trained

    The block must end with `return run.finish(summary)`. An exception or an interrupt leaves the partial directory for
    `--resume`; without a checkpoint it is removed.
    Raises InputError for unusable inputs or a resume against changed ones, OutputError for an unusable `--out`.
    """
    if ranks.size < announced():
        raise UsageError(f"{command} was started with {announced()} processes", "start it with one, without --gpus")
    partial = partial_path(options.out)
    with ExitStack() as held:
        start = Start(command, config, options, ranks.size, strategy)
        origin, resumed = ranks.on_main(lambda: _open(start, held))
        run = Run(command, partial, options, origin, resumed, ranks)
        try:
            yield run
        except Exception as error:
            kept = _worth_keeping(partial)
            said = with_way_on(error, kept) if isinstance(error, Gemma2Error) else None
            short = said or out_of_memory(error, config, run.phase or command, kept, run.memory)
            if short is None or short is error:
                raise
            raise short from error


@dataclass(frozen=True)
class Start:
    """The arguments of a run, its number of processes, and how they hold what they train."""

    command: str
    config: Config
    options: RunOptions
    processes: int
    strategy: str = ""


def _open(start: Start, held: ExitStack) -> tuple[JsonObject, bool]:
    """Return the record of the run's origin, and whether it continues an interrupted run. `held` keeps the lock."""
    config, options = start.config, start.options
    inputs = [*named_inputs(config)]
    models = [named for named in inputs if named.is_model]
    check_parents([Parent(named.role, named.path) for named in models])
    for named in models:
        check_weights(named.path, f"--{named.role}")
    if options.resume and not options.force and (read_manifest(options.out) or {}).get("status") == "complete":
        raise OutputError(
            f"--out {options.out} is complete, there is nothing to resume",
            "use it as it is, or give --force in place of --resume to make it again",
        )
    check_output(options.out, options.force)
    for named in inputs:
        check_output(options.out, options.force, {f"--{named.role}" if named.is_model else "data": named.path})
    origin = {
        **origin_of(start.command, config, options.out, os.cpu_count() or 1),
        "processes": start.processes,
        **({"strategy": start.strategy} if start.strategy else {}),
        **made_with(start.command),
        "hardware": hardware(config),
        **({"precision": precision} if (precision := precision_of(config)) else {}),
        "started": now(),
    }
    held.enter_context(locked(options.out))
    remove_tokens(options.out)
    check_partial(partial_path(options.out))
    check_output(options.out, options.force)  # again: another process may have published it just before
    held.callback(_sweep, partial_path(options.out))  # before there is anything: an interrupt may come at any moment
    resumed = _prepare(partial_path(options.out), start, origin)
    clear_live(partial_path(options.out))  # an alert that nobody has heard is not for this run
    return origin, resumed


def _prepare(partial: Path, start: Start, origin: JsonObject) -> bool:
    """Make the partial directory, or check that the existing one may be continued. True if it is continued."""
    options = start.options
    if options.resume and (partial / STATE).is_file():
        before = read_state(partial)
        check_unchanged(before, start, partial)
        origin |= {"started": before.get("started"), **continued(start.command, start.config, before)}
        if BY_STEP in before:
            origin[BY_STEP] = before[BY_STEP]
        if before.get("processes", 1) != start.processes:
            origin[BEFORE] = before.get("processes", 1)
        if "continued" in origin:
            write_json(partial / STATE, origin)  # from here it is a run of these versions
        return True
    check_interrupted(options)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / STATE, origin)
    return False


def check_interrupted(options: RunOptions) -> None:
    """Raise OutputError for --resume without an interrupted run, and for a start that would throw one away."""
    partial = partial_path(options.out)
    begun = (partial / STATE).is_file()
    if options.resume and not begun:
        raise OutputError(f"no interrupted run exists for --out {options.out} to resume", "drop --resume")
    if begun and not (options.resume or options.force) and _worth_keeping(partial):
        what = f"an interrupted run of --out {options.out} exists"
        raise OutputError(what, "continue it with --resume, or start over with --force")


def _sweep(partial: Path) -> None:
    """Remove the partial directory of a run that did not get far, or the output that a finished one has replaced."""
    if not ((partial / STATE).is_file() and _worth_keeping(partial)):
        shutil.rmtree(partial, ignore_errors=True)


def _worth_keeping(partial: Path) -> bool:
    """Whether an interrupted run has anything to resume from: a checkpoint, finished rows, or a finished stage.

    A journal that was opened, and in which nothing is written yet, is nothing.
    """
    found = (path for pattern in KEPT for path in partial.glob(pattern))
    return any(path.suffix != ".jsonl" or path.stat().st_size for path in found)
