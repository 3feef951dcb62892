"""One schema per command: what a recipe, `--set` and the flags may say. Torch-free.

The flags and the `--help` of every command are generated from these fields, so a name, its bounds and its unit are
stated once. Defaults follow the WARP paper (2406.16768) and the Gemma 2 report (2408.00118) where they give one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .config import Config

__all__ = [
    "ConvertConfig",
    "DistributionConfig",
    "EvalConfig",
    "GenerateConfig",
    "MergeConfig",
    "PairsConfig",
    "ParetoConfig",
    "QuickstartConfig",
    "RewardConfig",
    "RlhfConfig",
    "SftConfig",
    "TinyConfig",
    "WarpConfig",
]

Model = Annotated[Path, Field(description="model directory")]
Data = Annotated[Path, Field(description="JSONL file")]
Seed = Annotated[int, Field(ge=0, description="seed of every random choice")]
Positive = Annotated[int, Field(ge=1)]


class SamplingFields(Config):
    """How completions are drawn."""

    temperature: float = Field(1.0, ge=0.0, le=5.0, description="sampling temperature; 0 is greedy")
    max_new_tokens: int = Field(256, ge=1, description="completion limit, tokens")
    batch_size: int = Field(32, ge=1, description="sequences generated or scored at once")


class TrainingFields(Config):
    """What every training step shares."""

    learning_rate: float = Field(1e-5, gt=0, lt=1, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, optimizer steps")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm limit")
    save_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    log_every: int = Field(1, ge=1, description="optimizer steps between lines of metrics.jsonl")
    seed: Seed = 0
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="further options of the TRL trainer, by TRL's names"
    )


class MergeConfig(Config):
    """A merge inside a pipeline. `gemma2 merge` has the full set of options."""

    method: Literal["slerp", "liti", "warp", "linear", "ema"]
    models: tuple[Path, ...] = Field(min_length=1, description="model directories; their order counts")
    base: Path | None = Field(None, description="the init that task vectors start from")
    etas: tuple[float, ...] = Field((), description="LITI: share of the merge in the result")


class ConvertConfig(Config):
    """Import a model as plain safetensors, with all its stop ids, a chat template and a pad token that is no stop."""

    source: Path = Field(description="GGUF file, a directory with one, or a model directory")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the written weights")


class TinyConfig(Config):
    """The embedded models: a small real Gemma 2 student and its teacher, trained from scratch."""

    train_prompts: int = Field(768, ge=8, description="prompts written to prompts.jsonl")
    heldout_prompts: int = Field(256, ge=8, description="prompts written to heldout.jsonl, none of them trained on")
    seed: Seed = 0


class GenerateConfig(SamplingFields):
    """Teacher completions for a file of prompts."""

    teacher: Model
    prompts: Data
    n: int = Field(1, ge=1, description="completions per prompt")
    keep_truncated: bool = Field(False, description="keep completions that ran into the limit")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    seed: Seed = 0


class LoraFields(Config):
    """Low-rank adaptation."""

    lora_rank: int = Field(0, ge=0, description="rank of the LoRA adapter; 0 trains all weights")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA scale is alpha / rank")


class SftConfig(TrainingFields, LoraFields):
    """Supervised fine-tuning on prompt and completion, or on conversations."""

    model: Model
    data: Data
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; default: the whole batch")
    max_length: int = Field(1024, ge=8, description="longest row, tokens")
    on_overlong: Literal["drop", "truncate", "error"] = Field("drop", description="what happens to longer rows")
    end_of_turn: Literal["eot", "eot+eos"] = Field("eot+eos", description="last target of a conversation")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="share of rows held out for the evaluation loss")


class RewardConfig(TrainingFields, LoraFields):
    """A Bradley-Terry reward model from preference pairs."""

    model: Model
    data: Data
    epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="pairs per optimizer step")
    max_length: int = Field(1024, ge=8, description="longest conversation, tokens")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="share of pairs held out for accuracy and calibration")


class PairsConfig(SamplingFields):
    """Preference pairs: n samples per prompt of a model, ranked by a judge."""

    model: Model
    prompts: Data
    judge: str = Field(description="reward function as module:function, or the directory of a reward model")
    n: int = Field(4, ge=2, description="samples per prompt")
    select: Literal["extremes", "random", "all"] = Field(
        "extremes", description="the best against the worst sample, any two that differ, or all that differ"
    )
    min_margin: float = Field(0.0, ge=0, description="scores must differ by more than this to make a pair")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    seed: Seed = 0


class RewardFields(Config):
    """What a completion is worth."""

    reward: Path | None = Field(None, description="reward model directory")
    reward_fn: str | None = Field(None, description="reward function as module:function, instead of a reward model")
    length_penalty: float = Field(0.0, ge=0, description="subtracted per token (WARP, App. E: 0.0005)")
    missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted from a completion that was cut at the limit")


class RlFields(RewardFields):
    """The RL stage of WARP (2406.16768, Algorithm 1, lines 3-8)."""

    steps: int = Field(100, ge=1, description="optimizer steps T")
    prompts_per_step: int = Field(16, ge=1, description="distinct prompts per optimizer step")
    n: int = Field(4, ge=2, description="samples per prompt: the group of the leave-one-out baseline")
    beta: float = Field(0.1, ge=0, description="weight of the KL to the anchor, per nat")
    anchor: Literal["ema", "sft", "none"] = Field("ema", description="what the KL of the reward is measured to")
    mu: float = Field(0.01, ge=0, le=1, description="EMA rate of the anchor, per optimizer step")
    temperature: float = Field(0.9, gt=0, le=5, description="sampling temperature")
    max_new_tokens: int = Field(128, ge=1, description="completion limit, tokens")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; default: the whole batch")
    eval_every: int = Field(100, ge=1, description="optimizer steps between evaluations on held-out prompts")
    eval_prompts: int = Field(64, ge=2, description="held-out prompts per evaluation")
    max_kl: float | None = Field(
        200.0, gt=0, description="stop when the KL to the SFT policy reaches this, nats per sequence"
    )
    max_dead_steps: int = Field(50, ge=1, description="stop after this many steps without any difference in reward")


class RlhfConfig(TrainingFields, RlFields):
    """RL from a reward model, with the KL anchored to an EMA of the policy."""

    policy: Model
    prompts: Data
    sft: Path | None = Field(None, description="the policy that the measured KL refers to; default: --policy")
    heldout: Path | None = Field(None, description="JSONL of evaluation prompts; default: a tenth of --prompts")
    learning_rate: float = Field(1e-6, gt=0, lt=1, description="peak learning rate (Adam)")
    warmup_steps: int = Field(100, ge=0, description="linear warm-up, optimizer steps")


class DistributionConfig(SamplingFields, RewardFields):
    """How a policy is measured: common prompts, common seeds, reward and KL with standard errors."""

    sft: Model
    prompts: Data
    n: int = Field(1, ge=1, description="samples per prompt")
    judge_fn: str | None = Field(None, description="a second score as module:function, reported beside the reward")
    limit: int | None = Field(None, ge=2, description="use only the first prompts of the file")
    seed: Seed = 0


class EvalConfig(DistributionConfig):
    """Reward, KL to the SFT policy, length and truncation of one policy."""

    model: Model


class ParetoConfig(DistributionConfig):
    """The KL-reward front: policies, and the line from init to merge at several eta, measured alike."""

    policies: tuple[Path, ...] = Field((), description="policy directories")
    init: Path | None = Field(None, description="where the eta line starts; default: --sft")
    merged: Path | None = Field(None, description="where the eta line ends: the last SLERP, before LITI")
    etas: tuple[float, ...] = Field((0.0, 0.1, 0.3, 0.5, 0.8, 1.0), description="points on the line from init to merge")


class WarpConfig(TrainingFields, RlFields):
    """WARP (2406.16768, Algorithm 1): M policies, SLERP, LITI, repeated I times, then the front."""

    sft: Model
    prompts: Data
    heldout: Data
    policies: int = Field(2, ge=1, le=64, description="M: RL runs per iteration")
    iterations: int = Field(2, ge=1, le=100, description="I: rounds of RL, SLERP and LITI")
    eta: float = Field(0.3, gt=0, le=1, description="LITI: the share of the merge in the next init")
    etas: tuple[float, ...] = Field((0.0, 0.1, 0.3, 0.5, 0.8, 1.0), description="points of the front")
    learning_rate: float = Field(1e-6, gt=0, lt=1, description="peak learning rate (Adam)")
    warmup_steps: int = Field(100, ge=0, description="linear warm-up, optimizer steps")
    judge_fn: str | None = Field(None, description="a second score as module:function, reported beside the reward")
    compare: tuple[Path, ...] = Field((), description="further model directories measured beside the front")
    eval_n: int = Field(1, ge=1, description="samples per held-out prompt in the final evaluation")
    pick: str = Field(
        "best-reward",
        pattern=r"^(best-reward|kl<=\d+(\.\d+)?|eta=\d+(\.\d+)?)$",
        description="which point of the front becomes the model: best-reward, kl<=X or eta=X",
    )


class QuickstartConfig(Config):
    """The whole path on the embedded models. Each section holds settings of the step of that name."""

    seed: Seed = 0
    train_prompts: int = Field(768, ge=8, description="prompts that the teacher answers and RL trains on")
    heldout_prompts: int = Field(256, ge=8, description="prompts that every figure of the final table is measured on")
    generate: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 generate")
    sft: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 sft")
    pairs: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 reward pairs")
    reward: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 reward")
    warp: dict[str, Any] = Field(default_factory=dict, description="settings of gemma2 warp")
