"""The plan that `--dry-run` prints of one command: models, data, batches, memory, disk, time. Torch-free.

A plan is always printed: memory or a disk that is too small is a line of it (`problems`), not its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import parameter_count
from gemma2.core.outputs.staging import check_output
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.runs.estimates import GIB, Sources, Work, estimate, matmul_rate
from gemma2.posttrain.runs.inputs import inputs_of
from gemma2.posttrain.runs.machine import Memory, free_disk, free_memory
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig, TrainingFields, WarpConfig
from gemma2.posttrain.schemas.config import Config

from .data_rows import RowsFound
from .of_command import CommandChecks

WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")  # between two words of a schema's name

__all__ = ["disk_problem", "memory_problem", "needs", "plan"]


def plan(config: Config, options: RunOptions | None) -> JsonObject:
    """The resolved configuration of a step, what it reads, and its needs.

    options  where it writes; None for a command that only prints

    Raises what the step itself would raise before it begins.
    """
    models = inputs_of(config)
    checks = CommandChecks()
    together = checks.inputs(config)
    if options is not None:
        check_output(options.out, options.force, {f"--{role}": path for role, path in models.items()})
    rows = checks.contents(config, together)
    name = WORD.sub(" ", type(config).__name__.removesuffix("Config")).lower()
    if options is None:
        document: JsonObject = {"plan": f"{name}, nothing was loaded"}
    else:
        document = {"plan": f"{name} -> {options.out}, nothing was written"}
    document |= {role: f"{path} ({parameter_count(path):,} parameters)" for role, path in models.items()}
    document |= {"data": [found.row() for found in rows]} if rows else {}
    shown = next((found for found in rows if found.first), None)
    document |= {"first_row": {"data": str(shown.path), "text": shown.first}} if shown else {}
    document |= batches(config, rows)
    document |= needs(config, checks.sources, options.out if options else None)
    return document | {"config": config.model_dump(mode="json")}


def needs(config: Config, sources: Sources, out: Path | None) -> JsonObject:
    """Memory, disk and time of a step, next to what is free here; `problems` says what does not fit."""
    work = estimate(config, sources)
    if work is None:
        return {}
    memory = free_memory()
    found: JsonObject = {
        **work.facts,
        "memory_gib": round(work.memory / GIB, 3),
        "memory_free_gib": round(memory.free / GIB, 1),
        "memory_of": memory.where,
    }
    problems = [memory_problem(config, work, memory)]
    if out is not None:
        disk = free_disk(out)
        found |= {"disk_gib": round(work.disk / GIB, 3), "disk_free_gib": round(disk / GIB, 1)}
        problems.append(disk_problem(work, out, disk))
    if work.operations:
        found["cpu_hours_at_least"] = float(f"{work.operations / matmul_rate() / 3600:.2g}")
    named = [problem for problem in problems if problem]
    return found | ({"problems": named} if named else {})


def memory_problem(config: Config, work: Work, memory: Memory) -> str | None:
    """One line, as "what; fix", if the weights and what belongs to them do not fit."""
    if not work.memory > memory.free:
        return None
    needed, free = sizes_apart(work.memory, memory.free)
    what = f"memory: about {needed} are needed before activations, {free} of {memory.where} are free"
    return f"{what}; {_advice(config)}"


def disk_problem(work: Work, out: Path, disk: float) -> str | None:
    """One line, as "what; fix", if the output and its checkpoints do not fit."""
    if not work.disk > disk:
        return None
    needed, free = sizes_apart(work.disk, disk)
    return f"disk: --out {out} needs about {needed}, {free} are free; free some space, or choose another disk"


def _advice(config: Config) -> str:
    if getattr(config, "lora_rank", None) == 0:
        return "give --lora-rank 16, or use a smaller model"
    return "use a smaller model, or a machine with more"


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
    mean = sum(found.rows * found.mean for found in training) / total if total else math.nan
    micro = config.micro_batch_size or config.batch_size
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
