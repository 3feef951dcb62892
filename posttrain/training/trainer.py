"""Shared parts of the TRL-based steps: trainer arguments, logging into the run, guards, the run itself."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar, cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gemma2.core.errors import AlertStop, GuardStop, InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.progress import Progress, Task
from gemma2.core.rounding import is_still
from gemma2.posttrain.models.loading import default_device
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import Network
from gemma2.posttrain.runs.live import LiveRecord, take_alert
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas import DistillConfig, RlhfConfig, TrainingFields
from gemma2.posttrain.sharding.units import local, whole

from .as_asked import check_recipe
from .checkpoints import check_room, checkpoint_bytes, latest_checkpoint, mark_complete, newest_step
from .first_steps import FirstSteps, always
from .forward_check import check_forward
from .memory_advice import fitting_flags, held_by
from .movement import Movement
from .tracking import check_tracking, tracked
from .trainer_options import refuse_options
from .warmup import start_above_zero

__all__ = [
    "PeriodicEvaluation",
    "RunCallback",
    "configured",
    "evaluations",
    "metrics_of",
    "train",
    "trainer_arguments",
]

LOWER = "lower --learning-rate"
# Name of a metric in transformers -> name in metrics.jsonl and on the bar.
RENAMED = {"grad_norm": "gradient_norm"}
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
    on_gpu = default_device().type != "cpu"
    arguments = {
        "output_dir": str(run.checkpoints),
        "learning_rate": config.learning_rate,
        # transformers takes a number below 1 as a share of the steps, rounded up.
        "warmup_steps": config.warmup_ratio if config.warmup_steps is None else config.warmup_steps,
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
        "ddp_find_unused_parameters": False,  # each step uses all
        **ours,
    }
    check_tracking(config.report_to)
    known = {item.name for item in fields(schema) if item.init}
    refuse_options(config, known, unused, arguments.keys() - {"bf16", "activation_checkpointing", "use_cpu"})
    return arguments | config.trainer


def configured(schema: type[C], config: TrainingFields, arguments: JsonMapping) -> C:
    """Build a TRL config from `trainer_arguments`. Raises UsageError if it refuses a value of the user's `trainer:`."""
    try:
        built = schema(**arguments)
    except (ValueError, TypeError, ImportError, OSError, LookupError, AttributeError, RuntimeError) as error:
        if not config.trainer:  # only arguments of the suite: a bug
            raise
        detail = " ".join(str(error).split())[:200]
        raise UsageError(f"'trainer' ({', '.join(config.trainer)}): {detail}", "fix it, or leave it out") from error
    check_recipe(config, cast(TrainingArguments, built))
    found = cast(TrainingArguments, built)
    if found.n_gpu > 1:  # one process: the Trainer would take nn.DataParallel, in which no loss of ours runs
        found._n_gpu = 1
    return built


# A norm that was clipped is the limit, less rounding and the 1e-6 that torch adds to the divisor.
CLIPPED = 1 - 1e-4


class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Connects a Trainer to a run: metrics, progress bar, warm-up, NaN guard, alerts and the mark of checkpoints.

    `shown` maps names of metrics to their short names on the progress bar. `clipped` in the metrics is the share of all
    steps so far whose gradient was longer than --max-grad-norm.
    """

    def __init__(self, run: Run, progress: Progress, label: str, shown: Mapping[str, str] | None = None) -> None:
        self.run = run
        self.progress = progress
        self.label = label
        self.shown = dict(shown or {"loss": "loss"})
        self.task: Task | None = None
        self.live: dict[str, float | str] = {}
        self.clipped = 0  # steps
        self.steps = 0
        self.start: Movement | None = None
        self.record = LiveRecord(run.path, label) if run.ranks.is_main else None
        self._bar: AbstractContextManager[Task] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        start_above_zero(cast("LRScheduler | None", kwargs.get("lr_scheduler")), args.get_warmup_steps(state.max_steps))
        self.steps, self.clipped = state.global_step, self._clipped_before(state.global_step)
        visible = 0 if args.device.type == "cpu" else torch.accelerator.device_count()
        if visible > 1 and args.world_size == 1:
            self.progress.note(f"{visible} GPUs are visible, one is used; CUDA_VISIBLE_DEVICES chooses which")
        self._bar = self.progress.task(self.label, total=state.max_steps, unit="steps")
        self.task = self._bar.__enter__()
        self.task.advance(state.global_step)
        if self.record is not None:
            self.record.begin(state.global_step, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.run.phase = f"step {state.global_step + 1} of {self.label}"
        self.run.ranks.on_main(lambda: self._hear(state.global_step + 1))  # one rank looks: all stop at the same step

    def _hear(self, step: int) -> None:
        """End the run if a watcher asks for it."""
        said = take_alert(self.run.path)
        if said is not None:
            raise AlertStop(f"step {step} of {self.label}: ended by an alert: {said}")  # `open_run` adds the way on

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, also if the training stopped early or an error is on its way."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.__exit__(*sys.exc_info())
            if self.record is not None:
                self.record.end(sys.exc_info()[1])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        model = cast(Network, kwargs["model"])
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients:
            return
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        norm = float(norms.norm())
        if not math.isfinite(norm):
            raise GuardStop(
                f"step {state.global_step + 1} of {self.label}: the gradient is NaN or infinite, nothing was updated",
                LOWER,
            )
        self.steps = state.global_step + 1
        self.clipped += args.max_grad_norm > 0 and norm >= CLIPPED * args.max_grad_norm

    def _clipped_before(self, step: int) -> int:
        """Return the number of clipped steps before a resume; every checkpoint has a line of metrics."""
        lines = metrics_of(self.run) if step and self.run.ranks.is_main else []
        shares = [line["clipped"] for line in lines if "clipped" in line]
        return round(shares[-1] * step) if shares else 0

    def summary(self, model: Network) -> JsonObject:
        """Return for the manifest the share of clipped steps and how far the weights moved; warn if they did not."""
        moved = self.start.relative(model) if self.start else None
        if is_still(moved):
            self.progress.warn(
                f"{self.label}: the weights moved by {moved:.1g} of their norm, less than rounding: the result does "
                "not differ from its start; raise --learning-rate, or train for more steps"
            )
        return {"clipped": self.clipped / self.steps if self.steps else None, "weights_moved": moved}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Figures since the last line are not part of a checkpoint: with a line before each, none is lost on resume.
        control.should_log = control.should_log or control.should_save
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            self._check_weights(state.global_step, cast(Network, kwargs["model"]))
        if control.should_save:
            needed = checkpoint_bytes(args.output_dir, cast(Network, kwargs["model"]), kwargs.get("optimizer"))
            self.run.ranks.on_main(lambda: check_room(Path(args.output_dir), needed, state.global_step))
        if self.task is not None:
            self.task.advance(1, **self.live)
        if self.record is not None:
            self.record.advance(state.global_step)

    def _check_weights(self, step: int, model: Network) -> None:
        """Stop before weights are saved that are NaN or infinite: the update itself may make them so."""
        held = (local(parameter.detach()) for parameter in model.parameters() if parameter.requires_grad)
        trained = [part for part in held if part.numel()]
        largest = torch._foreach_norm(trained, math.inf) if trained else [torch.zeros(())]
        finite = bool(torch.stack([value.float() for value in largest]).isfinite().all())
        if not all(self.run.ranks.gather(finite)):
            raise GuardStop(f"step {step} of {self.label}: a weight is NaN or infinite, nothing was saved", LOWER)

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
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise GuardStop(f"step {state.global_step} of {self.label}: the loss is {metrics['loss']}", LOWER)
        self.live = {short: metrics[name] for name, short in self.shown.items() if name in metrics} or self.live
        if "train_loss" not in metrics:
            if "gradient_norm" in metrics and self.steps:
                metrics["clipped"] = self.clipped / self.steps
            self.run.log(state.global_step, **metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.run.ranks.barrier()  # every rank has written its part
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.run.ranks)


def metrics_of(run: Run) -> list[JsonObject]:
    """Return the lines of metrics.jsonl."""
    with (run.path / "metrics.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def evaluations(run: Run) -> list[JsonObject]:
    """Return all evaluations of a run, from step 0 to the last, those before a resume included."""
    return run.ranks.on_main(lambda: [row for row in metrics_of(run) if row.get("kind") == "eval"])


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


@contextmanager
def readable_state(checkpoint: Path | None) -> Iterator[None]:
    """Raise InputError for a file of a checkpoint that holds more than numbers: torch refuses to run what is in it."""
    try:
        yield
    except UnpicklingError as error:
        if checkpoint is None:
            raise
        what = f"a file of the checkpoint {checkpoint} holds other things than tensors and numbers"
        raise InputError(what, "remove that checkpoint: --resume then goes on from the one before it") from error


def train(trainer: Trainer, run: Run, callback: RunCallback, has_signal: Callable[[], bool] = always) -> None:
    """Run a Trainer to its end, from the latest complete checkpoint if the run is resumed.

    has_signal  whether there is anything to learn from the step that was just computed
    """
    trainer.remove_callback(PrinterCallback)
    found = run.ranks.on_main(lambda: latest_checkpoint(run)) if run.resumed else None
    if isinstance(plain := plain_model(trainer.model), PreTrainedModel):
        with whole(plain):
            check_forward(plain)
    begins = run.ranks.on_main(lambda: newest_step(run))
    trainer.add_callback(FirstSteps(callback.label, begins, has_signal, run.ranks))
    run.rewind(found[1] if found else -1)
    if run.resumed:
        run.goes_on_at(found[1] if found else 0)
    run.memory.holds = held_by(trainer) | run.memory.holds
    run.memory.advice = fitting_flags
    callback.start = Movement(trainer.model, run.ranks)  # a resumed run gets the weights of its checkpoint later
    try:
        with tracked(run), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with readable_state(found[0] if found else None):
                trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
    finally:
        callback.close()
