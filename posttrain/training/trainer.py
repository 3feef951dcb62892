"""Shared parts of the TRL-based steps: trainer arguments, logging into the run, guards, verified checkpoints.

Checkpoints of transformers have no mark of completeness, so a half-written one would be resumed from; here every
checkpoint gets a `complete.json` with the digest of each file, written last and verified before a resume.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar, cast

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2.core.errors import GuardStop, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject, write_json
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.progress import Progress, Task
from gemma2.posttrain.foreign.counterparts import hint_for
from gemma2.posttrain.models.protocols import Network
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas import DistillConfig, RlhfConfig, TrainingFields
from gemma2.posttrain.schemas.config import closest

from .tracking import check_tracking, tracked

__all__ = [
    "PeriodicEvaluation",
    "RunCallback",
    "configured",
    "evaluations",
    "latest_checkpoint",
    "mark_complete",
    "train",
    "trainer_arguments",
]

COMPLETE = "complete.json"
# Name of a metric in transformers -> name in metrics.jsonl and on the bar.
RENAMED = {"grad_norm": "gradient_norm"}
# Options of transformers that would break a guarantee of the suite.
BREAKS = {
    "save_only_model": "a resumed run would start with a fresh optimizer",
    "ignore_data_skip": "a resumed run would train on its first rows again",
    "logging_strategy": "metrics.jsonl is always written; --log-every sets how often",
}
C = TypeVar("C")

# Metrics with these in their names are not logged: they differ between a resumed run and an uninterrupted one.
DROPPED = ("runtime", "per_second", "total_flos", "step_time", "num_tokens")


def trainer_arguments(
    schema: type, config: TrainingFields, run: Run, unused: Collection[str] = (), **ours: object
) -> JsonObject:
    """Return keyword arguments of a TRL config class: ours, then the user's `trainer:` mapping, checked by name.

    Raises UsageError for an option that TRL does not have, that a flag of the command sets, or that is among `unused`
    and so would have no effect; and for a tracker that is not installed.
    """
    on_gpu = torch.cuda.is_available()
    arguments = {
        "output_dir": str(run.checkpoints),
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "max_grad_norm": config.max_grad_norm,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "report_to": "none",  # `tracking.py` sends the figures of metrics.jsonl instead
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "activation_checkpointing": on_gpu,
        **ours,
    }
    check_tracking(config.report_to)
    defaults = {"bf16", "activation_checkpointing", "use_cpu"}
    # The deprecated aliases are refused: activation_checkpointing would silently override them.
    known = {item.name for item in fields(schema) if item.init and not item.name.startswith("gradient_checkpointing")}
    for key in config.trainer:
        if key not in known:
            fix = hint_for(key, type(config).model_fields, config.trainer[key], config.trainer, "sets")
            raise UsageError(f"unknown key 'trainer.{key}'", fix or closest(key, known.difference(unused)))
        if key.startswith("hub_") or key == "push_to_hub":  # settings are recorded, but a token is secret
            raise UsageError(f"'trainer.{key}' is not accepted", "push the finished output with `hf upload`")
        if key in BREAKS:
            raise UsageError(f"'trainer.{key}' is not accepted: {BREAKS[key]}", "leave it out")
        if key in unused or key.startswith("eval_"):
            raise UsageError(f"'trainer.{key}' has no effect here", "see --help for the options of this command")
        if key in arguments and key not in defaults:
            fix = hint_for(key, type(config).model_fields, config.trainer[key], config.trainer, "sets")
            raise UsageError(
                f"'trainer.{key}' is set by an option of this command", fix or "use that option, see --help"
            )
    return arguments | config.trainer


def configured(schema: type[C], config: TrainingFields, arguments: JsonMapping) -> C:
    """Build a TRL config from `trainer_arguments`. Raises UsageError if it refuses a value of the user's `trainer:`."""
    try:
        return schema(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        if not config.trainer:  # only arguments of the suite: a bug
            raise
        detail = " ".join(str(error).split())[:200]
        raise UsageError(f"'trainer' ({', '.join(config.trainer)}): {detail}", "fix it, or leave it out") from error


def mark_complete(checkpoint: Path) -> None:
    """Record the digest of every file of a checkpoint; a checkpoint without this mark is not resumed from."""
    files = {path.name: digest_file(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    write_json(checkpoint / COMPLETE, {"files": files})


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its mark and every file has the recorded digest."""
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
        return all(digest_file(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def latest_checkpoint(run: Run) -> tuple[Path, int] | None:
    """Return the newest complete checkpoint and its step; newer, incomplete ones are removed."""
    found = sorted(run.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        if is_complete(path):
            return path, int(path.name.rpartition("-")[2])
        shutil.rmtree(path)
    return None


class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Connects a Trainer to a run: metrics, progress bar, NaN guard and the mark of checkpoints.

    `shown` maps names of metrics to their short names on the progress bar.
    """

    def __init__(self, run: Run, progress: Progress, label: str, shown: Mapping[str, str] | None = None) -> None:
        self.run = run
        self.progress = progress
        self.label = label
        self.shown = dict(shown or {"loss": "loss"})
        self.task: Task | None = None
        self.live: dict[str, float | str] = {}
        self._bar: AbstractContextManager[Task] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._bar = self.progress.task(self.label, total=state.max_steps, unit="steps")
        self.task = self._bar.__enter__()
        self.task.advance(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, also if the training stopped early or an error is on its way."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.__exit__(*sys.exc_info())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        model = cast(Network, kwargs["model"])
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients:
            return
        norms = torch._foreach_norm(gradients)
        if not math.isfinite(float(torch.stack([norm.float() for norm in norms]).sum())):
            raise GuardStop(
                f"step {state.global_step + 1} of {self.label}: the gradient is NaN or infinite, nothing was updated",
                "lower --learning-rate; --resume continues from the last checkpoint",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Figures since the last line are not part of a checkpoint: with a line before each, none is lost on resume.
        control.should_log = control.should_log or control.should_save
        if self.task is not None:
            self.task.advance(1, **self.live)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: JsonObject | None = None,
        **kwargs: object,
    ) -> None:
        metrics = {
            RENAMED.get(key, key): value
            for key, value in (logs or {}).items()
            if isinstance(value, int | float) and not any(part in key for part in DROPPED)
        }
        self.live = {short: metrics[name] for name, short in self.shown.items() if name in metrics} or self.live
        if "train_loss" not in metrics:
            self.run.log(state.global_step, **metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.run.ranks.barrier()  # every rank has written its part
        self.run.ranks.on_main(lambda: mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}"))


def evaluations(run: Run) -> list[JsonObject]:
    """Return all evaluations of a run, from step 0 to the last, those before a resume included."""

    def read() -> list[JsonObject]:
        with (run.path / "metrics.jsonl").open(encoding="utf-8") as lines:
            return [row for row in map(json.loads, lines) if row.get("kind") == "eval"]

    return run.ranks.on_main(read)


class PeriodicEvaluation(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Calls `measure` at step 0, every `config.eval_every` steps and at the end."""

    config: DistillConfig | RlhfConfig

    def measure(self, step: int) -> None:
        """Measure the model and log the figures."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == 0:  # a resumed run logged it
            self.measure(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self.config.eval_every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)


def train(trainer: Trainer, run: Run, callback: RunCallback) -> None:
    """Run a Trainer to its end, from the latest complete checkpoint if the run is resumed."""
    trainer.remove_callback(PrinterCallback)
    found = run.ranks.on_main(lambda: latest_checkpoint(run)) if run.resumed else None
    run.rewind(found[1] if found else -1)
    try:
        with tracked(run), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
    finally:
        callback.close()
