"""Linear warm-up from the first step on: step k of W has k / W of the learning rate.

transformers counts from 0: there the first step has a learning rate of 0 and changes nothing, and step W still has
(W - 1) / W. Everything after the warm-up is the schedule of transformers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer

from gemma2.core.errors import UsageError
from gemma2.posttrain.schemas import TrainingFields

__all__ = ["check_warmup", "start_above_zero", "total_steps"]


def check_warmup(config: TrainingFields, steps: int) -> None:
    """Raise UsageError for a warm-up that is as long as the training."""
    try:
        config.check_warmup(steps)
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        raise UsageError(what, hint) from error


def total_steps(trainer: Trainer, rows: int) -> int:
    """Return the optimizer steps of a training on `rows` rows per epoch, before anything is trained."""
    arguments = trainer.args
    batches = -(-rows // (arguments.train_batch_size * arguments.world_size))
    return int(trainer.set_initial_training_values(arguments, range(batches))[-1])


def start_above_zero(scheduler: LRScheduler | None, warmup: int) -> None:
    """Move a schedule's warm-up ahead by one step. Schedules that are not functions of the step stay as they are."""
    if not isinstance(scheduler, LambdaLR) or warmup < 1:
        return
    scheduler.lr_lambdas = [_ahead(factor, warmup) for factor in scheduler.lr_lambdas]
    rates = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, rate, factor in rates:
        group["lr"] = rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _ahead(factor: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    def at(step: int) -> float:  # steps that are done
        return (step + 1) / warmup if step < warmup else factor(step)

    return at
