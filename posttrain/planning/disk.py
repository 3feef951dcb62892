"""What a command writes to the disk, by part. Bytes; torch-free, pure.

the output                    fp32 weights, merged, or the adapter alone
checkpoints                   weights that are trained and their two moments (12 bytes per trained element), for RL
                              the moving average too; two are kept while the third is written
best weights                  with --keep best, in the run and in its checkpoints as links to one file
"""

from __future__ import annotations

from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlFields, RlhfConfig, SftConfig, WarpConfig
from gemma2.posttrain.schemas.config import Config

from .learning import Sizes
from .parts import MemoryPart
from .shapes import ModelShape

__all__ = ["CHECKPOINTS", "disk_of"]

CHECKPOINTS = 3  # two are kept while the next one is written
TRAINING = (SftConfig, DistillConfig, RewardConfig, RlhfConfig)


def disk_of(config: Config, sizes: Sizes) -> tuple[MemoryPart, ...]:
    """Return what a training writes, at most at one time; () for a command that does not train."""
    if isinstance(config, WarpConfig):
        return _of_warp(config, sizes(config.sft))
    if not isinstance(config, TRAINING):
        return ()
    shape = sizes(config.policy if isinstance(config, RlhfConfig) else config.model)
    elements = shape.adapter_parameters(config.lora_rank, config.lora_targets) if config.lora_rank else shape.parameters
    adapter = getattr(config, "lora_output", "merged") == "adapter"
    average = anchor_bytes(config, shape) if isinstance(config, RlhfConfig) else 0.0
    parts = [
        MemoryPart("output", 4.0 * (elements if adapter else shape.parameters)),
        MemoryPart("anchor, next to the output", 4.0 * shape.parameters if average else 0.0),
        MemoryPart(f"{CHECKPOINTS} checkpoints", CHECKPOINTS * (12.0 * elements + average)),
        MemoryPart("best weights", 4.0 * elements if getattr(config, "keep", "last") == "best" else 0.0),
    ]
    return tuple(part for part in parts if part.bytes != 0)


def _of_warp(config: WarpConfig, shape: ModelShape) -> tuple[MemoryPart, ...]:
    """Every policy with its anchor, every merge and init, the chosen model; checkpoints of the runs at one time."""
    model, runs = 4.0 * shape.parameters, config.iterations * config.policies
    elements = shape.adapter_parameters(config.lora_rank, config.lora_targets) if config.lora_rank else shape.parameters
    average = anchor_bytes(config, shape)
    at_once = min(config.jobs, config.policies)
    parts = [
        MemoryPart(f"{runs} policies", runs * model),
        MemoryPart(f"{runs} anchors next to them", runs * model if average else 0.0),
        MemoryPart(f"{config.iterations} merges", config.iterations * model if config.policies > 1 else 0.0),
        MemoryPart(f"{config.iterations} inits", config.iterations * model),
        MemoryPart("chosen model", model),
        MemoryPart(f"checkpoints of {at_once} at a time", at_once * CHECKPOINTS * (12.0 * elements + average)),
    ]
    return tuple(part for part in parts if part.bytes != 0)


def anchor_bytes(config: RlFields, shape: ModelShape) -> float:
    """Return the bytes of the moving average in a checkpoint: fp32, of all that is trained, or of adapters' factors."""
    if config.anchor != "ema":
        return 0.0
    if not config.lora_rank:
        return 4.0 * shape.parameters
    if config.lora_anchor == "factors":
        return 4.0 * shape.adapter_parameters(config.lora_rank, config.lora_targets)
    return 4.0 * shape.adapted_weights(config.lora_targets)
