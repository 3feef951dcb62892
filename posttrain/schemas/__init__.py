"""One schema per command: the settings that a recipe, `--set` and flags may give. Torch-free.

The flags and the `--help` of every command are generated from these fields, so a name, its bounds and its unit are
stated once. Defaults follow the WARP paper (2406.16768) and the Gemma 2 report (2408.00118) if they give one.
"""

from .distill import DistillCacheConfig, DistillConfig
from .evaluate import DistributionConfig, EvalConfig, ParetoConfig, PickConfig
from .fields import LoraFields, SamplingFields, TrainingFields
from .filter import FilterConfig
from .generate import GenerateConfig
from .pipeline import PipelineFile, Resources, StageFile
from .reward import PairsConfig, ProbeConfig, RewardConfig, RewardEvalConfig, RewardScoreConfig
from .rlhf import RewardFields, RlFields, RlhfConfig, VllmFields
from .sft import SftConfig
from .tools import ConvertConfig, MergeConfig, TinyConfig
from .warp import WarpConfig

__all__ = [
    "ConvertConfig",
    "DistillCacheConfig",
    "DistillConfig",
    "DistributionConfig",
    "EvalConfig",
    "FilterConfig",
    "GenerateConfig",
    "LoraFields",
    "MergeConfig",
    "PairsConfig",
    "ParetoConfig",
    "PickConfig",
    "PipelineFile",
    "ProbeConfig",
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
    "TinyConfig",
    "TrainingFields",
    "VllmFields",
    "WarpConfig",
]
