"""The plan that `--dry-run` prints of one command: models, data, batches, memory, disk, time. Torch-free.

A plan is always printed: memory or a disk that is too small is a line of it (`problems`), not its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.manifest import MANIFEST, STATE
from gemma2.core.outputs.staging import check_output, partial_path
from gemma2.core.ranks import announced, announced_here
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.planning.disk import disk_of
from gemma2.posttrain.planning.durations import duration
from gemma2.posttrain.planning.estimates import GIB, Sources, Work, estimate
from gemma2.posttrain.planning.learning import Sizes
from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, place_for, processes_of
from gemma2.posttrain.planning.named_models import NOTHING, NamedModels, sizes_of
from gemma2.posttrain.planning.verdicts import Verdict, judge
from gemma2.posttrain.runs.inputs import inputs_of
from gemma2.posttrain.runs.machine import MAIN, Memory, free_disk, free_memory
from gemma2.posttrain.runs.run_directory import RunOptions, check_interrupted
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig, TrainingFields, WarpConfig
from gemma2.posttrain.schemas.config import Config

from .data_rows import RowsFound
from .of_command import CommandChecks

USUAL = 80e9  # bytes of a GPU where several are planned for that this machine does not have
WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")  # between two words of a schema's name

__all__ = ["Planned", "disk_problem", "look", "memory_problem", "plan", "shortages", "work_of"]


@dataclass(frozen=True)
class Planned:
    """The plan of one command, and what its figures follow from.

    lengths  of the rows that were read
    steps    of a training, where they are known
    """

    document: JsonObject
    sizes: Sizes
    lengths: Lengths
    work: Work | None
    steps: int | None


def plan(config: Config, options: RunOptions | None) -> JsonObject:
    """The resolved configuration of a step, what it reads, and its needs; see `look`."""
    return look(config, options).document


def look(config: Config, options: RunOptions | None, named: NamedModels = NOTHING) -> Planned:
    """The resolved configuration of a step, what it reads, and its needs.

    options  where it writes; None for a command that only prints, or that has no --out yet
    named    models that are not on this disk

    Raises what the step itself would raise before it begins.
    """
    models = inputs_of(config)
    checks = CommandChecks(Sources(named.promised, list(named.promised)))
    together = checks.inputs(config)
    if options is not None:
        check_output(options.out, options.force, {f"--{role}": path for role, path in models.items()})
        ended = (partial_path(options.out) / MANIFEST, options.out / STATE)
        if not any(path.is_file() for path in ended):  # a run that was complete when it was killed is only published
            check_interrupted(options)
    rows = checks.contents(config, together)
    name = WORD.sub(" ", type(config).__name__.removesuffix("Config")).lower()
    if options is None:
        document: JsonObject = {"plan": f"{name}, nothing was loaded"}
    else:
        document = {"plan": f"{name} -> {options.out}, nothing was written"}
    document |= {role: _described(path, checks.sources, named) for role, path in models.items()}
    document |= {"data": [found.row() for found in rows]} if rows else {}
    shown = next((found for found in rows if found.first), None)
    document |= {"first_row": {"data": str(shown.path), "text": shown.first}} if shown else {}
    batch = batches(config, rows)
    sizes, lengths = sizes_of(named, checks.sources), lengths_of(rows)
    work = work_of(config, checks.sources, sizes)
    steps = batch.get("batch", {}).get("steps")
    document |= batch
    document |= needs(config, work, sizes, lengths, options.out if options else None)
    document |= duration(config, work.tokens, steps) if work else {}
    return Planned(document | {"config": config.model_dump(mode="json")}, sizes, lengths, work, steps)


def work_of(config: Config, sources: Sources, sizes: Sizes | None = None) -> Work | None:
    """Disk and tokens of a command; the disk of a training by its parts, as `gemma2 plan` shows them."""
    work = estimate(config, sources)
    parts = disk_of(config, sizes or sizes_of(NOTHING, sources)) if work is not None else ()
    return replace(work, disk=sum(part.bytes for part in parts)) if work is not None and parts else work


def _described(path: Path, sources: Sources, named: NamedModels) -> str:
    note = f": {named.notes[path]}" if path in named.notes else ""
    return f"{path} ({sources.parameters(path):,.0f} parameters{note})"


def lengths_of(rows: Sequence[RowsFound]) -> Lengths:
    """The longest rows and prompts, of data sets that were read whole; the limits count for others."""
    longest = {
        found.flag: min(max(found.lengths), found.limit or max(found.lengths))
        for found in rows
        if found.lengths and found.is_whole
    }
    unread = {found.flag for found in rows} - longest.keys()
    learned = [longest[flag] for flag in ("data", "eval_data") if flag in longest]
    asked = [longest[flag] for flag in ("prompts", "heldout") if flag in longest]
    return Lengths(
        max(learned) if learned and unread.isdisjoint({"data", "eval_data"}) else None,
        max(asked) if asked and unread.isdisjoint({"prompts", "heldout"}) else None,
    )


def needs(config: Config, work: Work | None, sizes: Sizes, lengths: Lengths, out: Path | None) -> JsonObject:
    """Memory and disk of a step, next to what is free here; `problems` says what does not fit."""
    found: JsonObject = {name: value for name, value in work.facts.items() if not _is_nan(value)} if work else {}
    memory = free_memory()
    memory, place = _asked(config, sizes, lengths, memory)
    verdict = judge(config, sizes, place, lengths)
    if place.devices > 1:
        found |= {"processes": place.devices, "strategy": "fsdp" if place.full_shard else "ddp"}
    problems: list[str | None] = []
    if verdict is not None and math.isfinite(verdict.needed):
        found |= {"memory_gib": round(verdict.needed / GIB, 3), "memory_peak": verdict.phase}
        problems.append(memory_problem(verdict, memory))
    elif work is not None and work.memory is not None:
        found["memory_gib"] = round(work.memory / GIB, 3)
    if found.get("memory_gib") is not None:
        found |= {"memory_free_gib": round(memory.free / GIB, 1), "memory_of": memory.where}
    if work is not None and work.disk:
        found["disk_gib"] = None if math.isnan(work.disk) else round(work.disk / GIB, 3)
        if out is not None:
            disk = free_disk(out)
            found["disk_free_gib"] = round(disk / GIB, 1)
            problems.append(disk_problem(work, out, disk))
    named = [problem for problem in problems if problem]
    return found | ({"problems": named} if named else {})


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _asked(config: Config, sizes: Sizes, lengths: Lengths, here: Memory) -> tuple[Memory, MemoryPlace]:
    """The memory of one device among those that the command runs on, and that device as a place."""
    count = max(announced(), processes_of(config))
    if count > 1 and here.where == MAIN:
        if announced() == 1:  # GPUs of another machine, of which nothing is known
            here = Memory(USUAL, f"a GPU of {USUAL / 1e9:.0f} GB, of which this machine has none")
        else:  # the processes share it
            here = Memory(here.free / announced_here(), MAIN)
    return here, place_for(config, sizes, lengths, place_of(here).kind, here.free, count)


def place_of(memory: Memory) -> MemoryPlace:
    """This machine as a place for a command."""
    return MemoryPlace("cpu" if memory.where == MAIN else "accelerator", capacity=memory.free)


def memory_problem(verdict: Verdict, memory: Memory) -> str | None:
    """One line, as "what; fix", if the largest phase does not fit."""
    if not verdict.needed > memory.free:
        return None
    needed, free = sizes_apart(verdict.needed, memory.free)
    what = f"memory: about {needed} are needed ({verdict.phase}), {free} of {memory.where} are free"
    return f"{what}; {verdict.advice}"


def shortages(config: Config, sources: Sources, rows: Sequence[RowsFound], out: Path) -> list[str]:
    """What a run that is about to begin may lack here: disk, memory; a line each. These are estimates."""
    sizes, memory = sizes_of(NOTHING, sources), free_memory()
    lengths = lengths_of(rows)
    memory, place = _asked(config, sizes, lengths, memory)
    work, verdict = work_of(config, sources, sizes), judge(config, sizes, place, lengths)
    found = [
        disk_problem(work, out, free_disk(out)) if work is not None else None,
        memory_problem(verdict, memory) if verdict is not None else None,
    ]
    return [problem for problem in found if problem]


def disk_problem(work: Work, out: Path, disk: float) -> str | None:
    """One line, as "what; fix", if the output and its checkpoints do not fit."""
    if not work.disk > disk:
        return None
    needed, free = sizes_apart(work.disk, disk)
    return f"disk: --out {out} needs about {needed}, {free} are free; free some space, or choose another disk"


def batches(config: Config, rows: Sequence[RowsFound]) -> JsonObject:
    """Sequences and tokens of one optimizer step, and the number of steps."""
    if isinstance(config, SftConfig | RewardConfig):
        return _supervised(config, rows)
    if isinstance(config, RlhfConfig | WarpConfig):
        samples = config.prompts_per_step * config.n
        found = {"sequences_per_step": samples, "micro_batch": config.micro_batch_size or samples}
        steps = {}
        if isinstance(config, RlhfConfig):
            steps = {"steps": config.steps, "warmup_steps": _warmup(config, config.steps)}
        return {"batch": found | {"new_tokens_per_step_at_most": samples * config.max_new_tokens} | steps}
    if isinstance(config, DistillConfig):
        micro = config.micro_batch_size or config.batch_size
        steps = {"steps": config.steps, "warmup_steps": _warmup(config, config.steps)}
        return {"batch": {"sequences_per_step": config.batch_size, "micro_batch": micro} | steps}
    return {}


def _supervised(config: SftConfig | RewardConfig, rows: Sequence[RowsFound]) -> JsonObject:
    """Batches of commands that go over their rows in epochs; rows held out and rows over the limit are not trained."""
    training = [found for found in rows if found.flag == "data"]
    held = config.eval_fraction if getattr(config, "eval_data", None) is None else 0.0
    kept = sum(found.rows * found.kept_share for found in training) * (1 - held)
    of_epochs = math.ceil(kept / config.batch_size) * config.epochs
    steps = config.max_steps or max(1, math.ceil(of_epochs))
    sides = 2 if isinstance(config, RewardConfig) else 1
    total = sum(found.rows for found in training)
    micro = config.micro_batch_size or config.batch_size
    if not total:  # nothing is known of the rows
        return {"batch": {"sequences_per_step": config.batch_size, "micro_batch": micro}}
    mean = sum(found.rows * found.mean for found in training) / total if total else math.nan
    found: JsonObject = {"sequences_per_step": config.batch_size, "micro_batch": micro}
    if not math.isnan(mean):
        found["tokens_per_step_about"] = round(mean * sides * config.batch_size)
    if not config.max_steps:
        _check_warmup(config, max(1, math.ceil(math.ceil(total / config.batch_size) * config.epochs)))
    return {
        "batch": found | {"rows_trained_about": round(kept), "steps": steps, "warmup_steps": _warmup(config, steps)}
    }


def _warmup(config: TrainingFields, steps: int) -> int:
    return math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps


def _check_warmup(config: TrainingFields, most: int) -> None:
    """Raise UsageError for a warm-up that would not end in `most` steps, the number if no row were left out."""
    try:
        config.check_warmup(most)
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        raise UsageError(what, hint) from error
