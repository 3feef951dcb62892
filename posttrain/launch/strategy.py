"""How several processes hold the model that they train: each the whole of it (ddp), or a share of it (fsdp).

    auto    one process: one; several: ddp where the plan says that it fits with 15 % to spare, else fsdp

Rank 0 decides, since the free memory of machines differs, and the others hear of it. Torch-free to import.
"""

from __future__ import annotations

import math
from typing import Literal

from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import Ranks
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.planning.estimates import Sources
from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, memory_of
from gemma2.posttrain.planning.named_models import NOTHING, sizes_of
from gemma2.posttrain.runs.machine import MAIN, free_memory
from gemma2.posttrain.schemas import StrategyFields

__all__ = ["SPARE", "Strategy", "needed_on", "strategy_of"]

Strategy = Literal["one", "ddp", "fsdp"]
SPARE = 0.15  # of a device, left free by ddp: a plan is an estimate


def needed_on(config: StrategyFields, processes: int, capacity: float, sharded: bool | None = None) -> float | None:
    """Return the bytes that a command needs on each of several GPUs; None where the plan does not know its models.

    capacity  bytes of one, for engines that take a share of it
    sharded   fsdp or not; default: as `--strategy` says
    """
    split = config.strategy == "fsdp" if sharded is None else sharded
    place = MemoryPlace("accelerator", processes, split, capacity)
    return _needed(config, place)


def _needed(config: StrategyFields, place: MemoryPlace) -> float | None:
    plan = memory_of(config, sizes_of(NOTHING, Sources()), place, Lengths())
    return None if plan is None or math.isnan(plan.peak.bytes) else plan.peak.bytes


def strategy_of(config: StrategyFields, ranks: Ranks, progress: Progress = SILENT) -> Strategy:
    """Return how the processes of a training hold its model, the same on every rank.

    fsdp may be asked of one process too. What `auto` comes to is one line to `progress`, with the figures.
    """
    if config.strategy == "fsdp":
        return "fsdp"
    if ranks.size == 1:
        return "one"
    if config.strategy == "ddp":
        return "ddp"
    return ranks.on_main(lambda: _decided(config, ranks.size, progress))


def _decided(config: StrategyFields, processes: int, progress: Progress) -> Strategy:
    memory = free_memory()
    if memory.where == MAIN:  # the processes of torchrun share it
        place = MemoryPlace("cpu", processes, capacity=memory.free / processes)
    else:
        place = MemoryPlace("accelerator", processes, capacity=memory.free)
    needed, most = _needed(config, place), (1 - SPARE) * place.capacity
    if needed is None:
        progress.note(f"strategy: fsdp on {processes} processes, the size of a model is not known")
        return "fsdp"
    texts = sizes_apart(needed, place.capacity)
    if needed <= most:
        progress.note(f"strategy: ddp on {processes} processes: {texts[0]} are needed on each, {texts[1]} are free")
        return "ddp"
    progress.note(
        f"strategy: fsdp on {processes} processes: ddp would need {texts[0]} on each, {texts[1]} are free, "
        f"and {SPARE:.0%} stay free"
    )
    return "fsdp"
