"""How much memory a command needs, by part and by phase, before it runs. Torch-free.

    memory_of(config, shape_of, MemoryPlace()).peak.bytes
    place_for(config, shape_of, Lengths(), "accelerator", 80e9)     where it runs, by --gpus, --nodes and --strategy

Each command is modelled as it runs: which models are there at once, in which dtype, what a forward pass keeps for the
backward pass, how logits of a wide vocabulary are cut. Measured against the peak of real runs by bench/plan.py
(docs/benchmarks.md); accelerators are computed by the same sums and not measured.
"""

from __future__ import annotations

from collections.abc import Callable

from gemma2.posttrain.schemas import (
    DistillCacheConfig,
    DistillConfig,
    EvalConfig,
    GenerateConfig,
    LaunchFields,
    PairsConfig,
    ParetoConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    StrategyFields,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import SuiteConfig

from . import answering, learning, reinforcing
from .learning import Sizes
from .parts import Kind, Lengths, MemoryPart, MemoryPlace, MemoryPlan, Moment, Phase, settled

__all__ = [
    "SPARE",
    "Lengths",
    "MemoryPart",
    "MemoryPlace",
    "MemoryPlan",
    "Phase",
    "memory_of",
    "place_for",
    "processes_of",
]

SPARE = 0.15  # of a device, which ddp leaves free: a plan is an estimate

# Each function takes a configuration of its key, the sizes of models, the place and the lengths of rows.
OF_COMMAND: dict[type[Config], Callable[..., list[Moment]]] = {
    SftConfig: learning.of_sft,
    DistillConfig: learning.of_distill,
    DistillCacheConfig: answering.of_cache,
    RewardConfig: learning.of_reward,
    ProbeConfig: answering.of_probe,
    RewardScoreConfig: answering.of_score,
    RewardEvalConfig: answering.of_score,
    PairsConfig: answering.of_pairs,
    RlhfConfig: reinforcing.of_rlhf,
    WarpConfig: reinforcing.of_warp,
    GenerateConfig: answering.of_generate,
    EvalConfig: answering.of_eval,
    ParetoConfig: answering.of_pareto,
    SuiteConfig: answering.of_suite,
}


def memory_of(config: Config, shapes: Sizes, place: MemoryPlace, lengths: Lengths | None = None) -> MemoryPlan | None:
    """Return what a command needs on each device; None for a command that runs no model.

    shapes   the shape of a model that the configuration names, by its path: `shape_of`, or what is known otherwise
    lengths  of the longest rows; default: the limits of the configuration
    """
    found = OF_COMMAND.get(type(config))
    moments = found(config, shapes, place, lengths or Lengths()) if found else []
    return settled(moments, place, bool(getattr(config, "lora_rank", 0))) if moments else None


def processes_of(config: Config) -> int:
    """Return the number of processes that the flags ask for, of WARP those of one RL run."""
    if isinstance(config, WarpConfig):
        return (config.gpus_per_policy or 1) * config.nodes
    if not isinstance(config, LaunchFields):
        return 1
    return (config.gpus or 1) * config.nodes


def place_for(
    config: Config, shapes: Sizes, lengths: Lengths, kind: Kind, capacity: float, processes: int | None = None
) -> MemoryPlace:
    """Return one device among those that a command runs on, as `--strategy` says.

    auto: ddp where it leaves `SPARE` of a device free, else fsdp, which divides what is trained; one process does not.

    capacity   bytes of a device
    processes  default: as the flags ask for
    """
    count = processes_of(config) if processes is None else processes
    whole = MemoryPlace(kind, count, False, capacity)
    if not isinstance(config, StrategyFields):
        return whole
    divided = MemoryPlace(kind, count, True, capacity)
    if config.strategy == "fsdp":
        return divided
    if config.strategy == "ddp" or count == 1 or getattr(config, "base_bits", None) is not None:
        return whole
    plan = memory_of(config, shapes, whole, lengths)
    fits = plan is not None and plan.peak.bytes <= (1 - SPARE) * capacity
    return whole if fits else divided
