"""A Trainer whose model is already divided over processes (`posttrain/sharding`): checkpoints, resume, accumulation.

transformers 5.23 lets a model own its placement (`_is_distributed_loading_by_transformers`), wraps nothing then, and
refuses to save what a resume needs; here that is written and read by torch.distributed.checkpoint. A checkpoint can be
resumed on another number of processes: weights, moments and anchor are bit for bit the same, the random numbers of the
Trainer begin anew from seed and step, and sums are rounded in another order.

Deviations from transformers, on private hooks (tests/posttrain/training/test_sharded_trainer.py guards them):
1. `save_model` writes nothing inside a checkpoint: shards are in `state/`.
2. `_load_optimizer_and_scheduler` restores weights, moments and whatever `further_state` names, in one collective.
3. Gradients are reduced after every micro-batch: kept whole until the last one they would take four bytes per parameter
   on each process. With replicas only the reduction between them waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from trl.models.utils import _ForwardRedirection

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.sharding.distributed_state import load_state, save_state
from gemma2.posttrain.sharding.units import is_sharded

__all__ = ["RootRedirection", "ShardedTrainer", "hand_over"]

R = TypeVar("R")

PROCESSES_FILE = "processes.pt"  # learning rate schedule, number of processes


def hand_over(model: object, asked: Mapping[str, object] | None = None) -> dict[str, object]:
    """Mark a sharded model as placed, before a Trainer is built. Returns the Trainer's arguments that go with it.

    model: sharded, in peft's wrapper or not. Its products have their dtype from `shard`: autocast stays off.
    asked: the options that the user gives to the Trainer. Raises UsageError for those that would have no effect.
    """
    plain = plain_model(model)  # type: ignore[type-var]  # any module
    assert is_sharded(plain)
    for name in ("bf16", "fp16"):
        if name in (asked or {}):
            raise UsageError(
                f"'trainer.{name}' has no effect with --strategy fsdp: products are in bf16 on an accelerator",
                "leave it out",
            )
    plain._is_distributed_loading_by_transformers = True  # type: ignore[attr-defined]
    plain._is_fsdp_managed_module = True  # type: ignore[attr-defined]
    return {"save_only_model": True, "bf16": False, "fp16": False}


class RootRedirection(_ForwardRedirection):  # type: ignore[misc]  # TRL is not typed
    """Calls a method inside the forward pass of one module, whatever wrapper it is called for: peft's has no shards."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, wrapper: object, inner: object, method: Callable[..., R], *arguments: object) -> R:
        """Return what the method returns."""
        result: R = super().__call__(self.root, self.root, method, *arguments)
        return result


class ShardedTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Mixin in front of a Trainer; without effect on a model that is not sharded."""

    @property
    def sharded(self) -> bool:
        """Whether the weights of the trained model are divided over processes."""
        return is_sharded(plain_model(self.model))

    def inside(self, model: object, method: Callable[..., R], *arguments: object) -> R:
        """Call a method inside the forward pass of what wraps or divides `model`.

        DistributedDataParallel reduces gradients, and FSDP gathers weights, for nothing but their own forward pass.
        """
        wrapper, inner = model, self.accelerator.unwrap_model(model)
        if self.sharded:
            wrapper = inner = plain_model(self.model)
        if wrapper is inner and not self.sharded:
            return method(*arguments)
        result: R = _ForwardRedirection()(wrapper, inner, method, *arguments)
        return result

    def further_state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Groups of tensors by name that a checkpoint of a sharded run holds besides weights and moments."""
        return {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a model, except into the checkpoint of a sharded run: its weights are in `state/`."""
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
        elif output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        Trainer._save_checkpoint(self, model, trial)  # not TRL's, which adds a model card
        if not self.sharded:
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder, plain_model(self.model), self.optimizer.optimizer, self.further_state())
        self._save_rng_state(str(folder))
        if self.args.should_save:
            kept = {"scheduler": self.lr_scheduler.state_dict(), "processes": self.args.world_size}
            torch.save(kept, folder / PROCESSES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not (Path(resume_from_checkpoint) / PROCESSES_FILE).is_file():
            raise InputError(
                f"the checkpoint {resume_from_checkpoint} is not one of a sharded run",
                "resume with the --strategy it began with",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            load_state(Path(checkpoint), plain_model(self.model), self.optimizer.optimizer, self.further_state())
            self.lr_scheduler.load_state_dict(_kept(checkpoint)["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None or _kept(checkpoint)["processes"] == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            transformers.set_seed(self.args.seed + self.state.global_step)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        plain = plain_model(self.model)
        assert isinstance(plain, FSDPModule)
        plain.set_requires_all_reduce(False)
        try:
            yield
        finally:
            plain.set_requires_all_reduce(True)


def _kept(checkpoint: str) -> dict[str, object]:
    kept: dict[str, object] = torch.load(Path(checkpoint) / PROCESSES_FILE, weights_only=True)
    return kept
