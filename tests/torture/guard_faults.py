"""Faults that are put into one step of a training."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from accelerate import Accelerator

from gemma2.posttrain.training import checkpoints, trainer
from gemma2.posttrain.training.trainer import RunCallback


@contextmanager
def at_step(step: int, method: str, fault: Callable[[object, torch.nn.Module], None]) -> Iterator[None]:
    """Call `fault` before a method of RunCallback hears of step `step` (counted from 1)."""
    heard = getattr(RunCallback, method)
    before = 1 if method in ("on_step_begin", "on_pre_optimizer_step") else 0

    def wrapped(self: RunCallback, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step + before == step:
            fault(self, kwargs["model"])
        heard(self, args, state, control, **kwargs)

    with patch.object(RunCallback, method, wrapped):
        yield


@torch.no_grad()
def spoil(value: float, gradients: bool = False) -> Callable[[object, torch.nn.Module], None]:
    """One element of one trained tensor, or of its gradient, becomes `value`."""

    def fault(_: object, model: torch.nn.Module) -> None:
        with torch.no_grad():
            parameter = next(p for p in model.parameters() if p.requires_grad and (p.grad is not None or not gradients))
            (parameter.grad if gradients else parameter).view(-1)[-1] = value

    return fault


@contextmanager
def loss_becomes(value: float, step: int, figure_alone: bool = False) -> Iterator[None]:
    """The loss of a step is `value`: before its backward pass, or only in what is logged."""
    now = [0]
    backward, training_step = Accelerator.backward, transformers.Trainer.training_step

    def spoilt(self: Accelerator, loss: torch.Tensor, **kwargs: object) -> None:
        backward(self, loss * value if now[0] == step and not figure_alone else loss, **kwargs)

    def logged(self: transformers.Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        now[0] = self.state.global_step + 1
        loss = training_step(self, *args, **kwargs)
        return loss * value if now[0] == step and figure_alone else loss

    with patch.object(Accelerator, "backward", spoilt), patch.object(transformers.Trainer, "training_step", logged):
        yield


def raising(error: Exception) -> Callable[[object, torch.nn.Module], None]:
    """A fault that raises."""

    def fault(*_: object) -> None:
        raise error

    return fault


@contextmanager
def disk_full(step: int, where: str) -> Iterator[None]:
    """No room at the checkpoint of a step: seen before it is written, in the middle of its files, or at its mark."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")
    reached = [False]
    mark, usage, save = trainer.mark_complete, checkpoints.shutil.disk_usage, torch.save

    def marked(checkpoint: Path, *ranks: object) -> None:
        if where == "mark" and checkpoint.name == f"checkpoint-{step}":
            raise full
        mark(checkpoint, *ranks)

    def measured(folder: Path) -> object:
        found = usage(folder)
        return type(found)(found.total, found.used, 0) if where == "room" and reached[0] else found

    def saved(value: object, file: object, **kwargs: object) -> None:
        if where == "files" and reached[0]:
            Path(str(file)).write_bytes(b"torn")
            raise full
        save(value, file, **kwargs)

    def arrive(*_: object) -> None:
        reached[0] = True

    with (
        patch.object(trainer, "mark_complete", marked),
        patch.object(checkpoints.shutil, "disk_usage", measured),
        patch.object(torch, "save", saved),
        at_step(step, "on_step_end", arrive),
    ):
        yield
