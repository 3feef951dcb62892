"""How several processes hold the model that they train: each the whole of it (ddp), or a share of it (fsdp).

    auto    one process: one; several: ddp where the plan says that it fits with 15 % to spare, else fsdp

Rank 0 decides, since the free memory of machines differs, and the others hear of it. Torch-free to import.
"""

from __future__ import annotations

from typing import Literal

from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import Ranks
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.planning.estimates import Sources
from gemma2.posttrain.planning.memory import SPARE, Lengths, MemoryPlace, memory_of, place_for
from gemma2.posttrain.planning.named_models import NOTHING, sizes_of
from gemma2.posttrain.runs.machine import MAIN, free_memory
from gemma2.posttrain.schemas import StrategyFields

__all__ = ["Strategy", "needed_on", "needed_on_one", "strategy_of"]

Strategy = Literal["one", "ddp", "fsdp"]


def needed_on_one(config: StrategyFields, capacity: float) -> float:
    """Return the bytes that a command needs on one GPU, NaN for a model of unknown size.

    capacity  bytes of the GPU, for engines that take a share of it
    """
    return needed_on(config, 1, capacity, config.strategy == "fsdp")


def needed_on(config: StrategyFields, processes: int, capacity: float, sharded: bool) -> float:
    """Return the bytes that a command needs on each of several GPUs, NaN for a model of unknown size."""
    return _needed(config, MemoryPlace("accelerator", processes, sharded, capacity))


def _needed(config: StrategyFields, place: MemoryPlace) -> float:
    plan = memory_of(config, sizes_of(NOTHING, Sources()), place, Lengths())
    assert plan is not None, "a training runs a model"
    return plan.peak.bytes


def strategy_of(config: StrategyFields, ranks: Ranks, progress: Progress = SILENT) -> Strategy:
    """Return how the processes of a training hold its model, the same on every rank.

    fsdp may be asked of one process too. What `auto` comes to is one line to `progress`, with the figures.
    """
    if config.strategy == "fsdp":
        return "fsdp"
    if ranks.size == 1:
        return "one"
    if config.strategy == "ddp" or getattr(config, "base_bits", None) is not None:
        return "ddp"  # weights in few bits are not divided
    return ranks.on_main(lambda: _decided(config, ranks.size, progress))


def _decided(config: StrategyFields, processes: int, progress: Progress) -> Strategy:
    memory = free_memory()
    on_cpu = memory.where == MAIN  # which the processes of torchrun share
    capacity = memory.free / processes if on_cpu else memory.free
    kind: Literal["cpu", "accelerator"] = "cpu" if on_cpu else "accelerator"
    place = place_for(config, sizes_of(NOTHING, Sources()), Lengths(), kind, capacity, processes)
    whole = _needed(config, MemoryPlace(kind, processes, False, capacity))
    strategy: Strategy = "fsdp" if place.full_shard else "ddp"
    there = f"strategy: {strategy} on {processes} processes"
    if whole != whole:  # NaN
        progress.note(f"{there}, since the size of a model is not known")
        return strategy
    needed, free = sizes_apart(whole, capacity)
    if strategy == "ddp":
        progress.note(f"{there}: {needed} are needed on each, {free} are free")
    else:
        progress.note(f"{there}: ddp would need {needed} on each, of {free} that are free, and leaves {SPARE:.0%}")
    return strategy
