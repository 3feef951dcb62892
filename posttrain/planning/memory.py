"""How much memory a command needs, by part and by phase, before it runs. Torch-free.

    memory_of(config, shape_of, MemoryPlace()).peak.bytes

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
    PairsConfig,
    ParetoConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import SuiteConfig

from . import answering, learning, reinforcing
from .learning import Sizes
from .parts import Lengths, MemoryPart, MemoryPlace, MemoryPlan, Moment, Phase, settled

__all__ = ["Lengths", "MemoryPart", "MemoryPlace", "MemoryPlan", "Phase", "memory_of"]

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
