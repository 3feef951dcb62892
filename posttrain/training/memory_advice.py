"""For a run that has no memory left: what its trainer holds, and the flags with which the planner says that it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import psutil  # type: ignore[import-untyped]
import torch
from transformers import Trainer

from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.models.loading import default_device
from gemma2.posttrain.planning.memory import Lengths, memory_of, place_for
from gemma2.posttrain.planning.shapes import shape_of
from gemma2.posttrain.planning.verdicts import judge
from gemma2.posttrain.schemas.config import Config

__all__ = ["fitting_flags", "held_by"]

LESS = 0.95  # of what the plan says: a run that ran out although its plan fits needs flags that take less all the same


def held_by(trainer: Trainer) -> dict[str, Callable[[], object]]:
    """The parts of memory that every training has, asked for when it is exhausted."""
    return {
        "weights": lambda: trainer.model,
        "gradients": lambda: [parameter.grad for parameter in trainer.model.parameters()],
        "optimizer": lambda: getattr(trainer.optimizer, "state", {}),
    }


def fitting_flags(config: Config) -> str:
    """Return flags with which a command fits into this device by its plan, and the figures; "" if no flags do."""
    device = default_device()
    on_host = device.type == "cpu"
    capacity = _main_memory() if on_host else _device_memory(device)
    place = place_for(config, shape_of, Lengths(), "cpu" if on_host else "accelerator", capacity)
    plan = memory_of(config, shape_of, place)
    if plan is None:
        return ""
    verdict = judge(config, shape_of, replace(place, capacity=min(capacity, LESS * plan.peak.bytes)))
    if verdict is None or not verdict.flags or verdict.needed_then is None:
        return ""
    then, now = sizes_apart(verdict.needed_then, verdict.needed)
    return f"{' '.join(verdict.flags)} ({then} by the plan, not {now})"


def _main_memory() -> float:
    return float(psutil.virtual_memory().total)


def _device_memory(device: torch.device) -> float:
    """Bytes of an accelerator, infinite where torch does not know them."""
    if device.type != "cuda":
        return math.inf
    return float(torch.cuda.get_device_properties(device).total_memory)
