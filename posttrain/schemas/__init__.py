"""One schema per command: the settings that a recipe, `--set` and flags may give. Torch-free.

The flags and the `--help` of every command are generated from these fields, so a name, its bounds and its unit are
stated once. Defaults follow the WARP paper (2406.16768) and the Gemma 2 report (2408.00118) if they give one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .distill import DistillCacheConfig, DistillConfig
    from .evaluate import DistributionConfig, EvalConfig, ParetoConfig, PickConfig
    from .fields import LaunchFields, LoraFields, SamplingFields, StrategyFields, TrainingFields
    from .filter import FilterConfig
    from .generate import GenerateConfig
    from .merge import MergeConfig
    from .pipeline import PipelineFile, Resources, StageFile
    from .reward import PairsConfig, ProbeConfig, RewardConfig, RewardEvalConfig, RewardScoreConfig
    from .rlhf import RewardFields, RlFields, RlhfConfig, VllmFields
    from .sft import SftConfig
    from .tools import ConvertConfig, ExtractLoraConfig, ReplaceTokenizerConfig, TinyConfig
    from .warp import WarpConfig

# Resolved on first use: a command pays for its own schema, not for all.
_HOMES = {
    "ConvertConfig": "tools",
    "DistillCacheConfig": "distill",
    "DistillConfig": "distill",
    "DistributionConfig": "evaluate",
    "EvalConfig": "evaluate",
    "ExtractLoraConfig": "tools",
    "FilterConfig": "filter",
    "GenerateConfig": "generate",
    "LaunchFields": "fields",
    "LoraFields": "fields",
    "MergeConfig": "merge",
    "PairsConfig": "reward",
    "ParetoConfig": "evaluate",
    "PickConfig": "evaluate",
    "PipelineFile": "pipeline",
    "ProbeConfig": "reward",
    "ReplaceTokenizerConfig": "tools",
    "Resources": "pipeline",
    "RewardConfig": "reward",
    "RewardEvalConfig": "reward",
    "RewardFields": "rlhf",
    "RewardScoreConfig": "reward",
    "RlFields": "rlhf",
    "RlhfConfig": "rlhf",
    "SamplingFields": "fields",
    "SftConfig": "sft",
    "StageFile": "pipeline",
    "StrategyFields": "fields",
    "TinyConfig": "tools",
    "TrainingFields": "fields",
    "VllmFields": "rlhf",
    "WarpConfig": "warp",
}

__all__ = [
    "ConvertConfig",
    "DistillCacheConfig",
    "DistillConfig",
    "DistributionConfig",
    "EvalConfig",
    "ExtractLoraConfig",
    "FilterConfig",
    "GenerateConfig",
    "LaunchFields",
    "LoraFields",
    "MergeConfig",
    "PairsConfig",
    "ParetoConfig",
    "PickConfig",
    "PipelineFile",
    "ProbeConfig",
    "ReplaceTokenizerConfig",
    "Resources",
    "RewardConfig",
    "RewardEvalConfig",
    "RewardFields",
    "RewardScoreConfig",
    "RlFields",
    "RlhfConfig",
    "SamplingFields",
    "SftConfig",
    "StageFile",
    "StrategyFields",
    "TinyConfig",
    "TrainingFields",
    "VllmFields",
    "WarpConfig",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
