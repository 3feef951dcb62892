"""The models of an RL run: the policy, what its KL is measured to, the anchor, and the reward.

Under LoRA the weights that are not adapted exist once: policy, reference and anchor share them. Where they are rounded
(--base-bits, or bf16 on an accelerator) the policy starts at the rounded model, and so is the reference it: the KL
begins at 0. The reward and its models are not touched by that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.adapters.frozen_base import load_trained
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.evaluation.evaluate import check_same_vocabulary
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.lora import check_targets, sharing_copy
from gemma2.posttrain.models.precision import HOST, frozen_dtype, rounded_copy
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.sharding.placement import Placement

from .ema import EmaAnchor, FactorAnchor, LoraAnchor
from .rollout import Rollout
from .sharded_setup import ShardedParts, divided_anchor, divided_models

__all__ = ["RlSetup", "make_anchor", "prepare"]


@dataclass(frozen=True)
class RlSetup:
    """The models and prompts that a run starts with.

    reference: the SFT policy that the measured KL refers to, in memory of the host where only evaluations run it. base:
    the policy's weights as they were, shared with it where they are frozen; None if all weights are trained. sharded:
    where the models are divided over processes; policy of the rollout, reference and anchor are then lent their
    weights, and base is None. starts_at_anchor: whether the KL to the anchor is 0 at the first step.
    """

    rollout: Rollout
    reference: CausalLM
    base: CausalLM | None
    starts_at_sft: bool
    starts_at_anchor: bool
    sharded: ShardedParts | None = None

    @property
    def trained(self) -> CausalLM:
        """The policy that the optimizer moves; its layers may hold adapters."""
        return self.rollout.policy if self.sharded is None else self.sharded.trained


def prepare(
    config: RlhfConfig, prompts: Sequence[Prompt], micro: int, placement: Placement, progress: Progress = SILENT
) -> RlSetup:
    """Load policy, SFT policy and reward. An EMA anchor comes later, when the policy has its adapters.

    Raises InputError for unusable models, UsageError for adapters that no layer can have.
    """
    starts_at_sft = config.sft is None or config.sft.resolve() == config.policy.resolve()
    starts_at_anchor = config.anchor == "ema" or (config.anchor == "sft" and starts_at_sft)
    if placement.layout is not None:
        rollout, reference, parts = divided_models(config, prompts, micro, placement, starts_at_sft)
        return RlSetup(rollout, reference, None, starts_at_sft, starts_at_anchor, parts)
    policy, tokenizer = load_trained(config.policy, config, progress, config.attention)
    check_targets(config, policy)
    chat = ChatFormat(tokenizer, policy.generation_config)
    base = sharing_copy(policy).requires_grad_(False) if config.lora_rank else None
    reference = base if base is not None and starts_at_sft else reference_of(config, policy, starts_at_sft)
    generator = torch.Generator().manual_seed(config.seed)
    score = reward_score(config, chat, micro)
    anchor = reference if config.anchor == "sft" else None
    rollout = Rollout(policy, anchor, chat, score, config, prompts, generator, micro, placement.ranks)
    return RlSetup(rollout, reference, base, starts_at_sft, starts_at_anchor)


def reference_of(config: RlhfConfig, policy: CausalLM, starts_at_sft: bool) -> CausalLM:
    """The SFT policy as a separate model: on an accelerator only where it is the anchor too."""
    device = policy.device if config.anchor == "sft" else HOST
    if starts_at_sft:
        if device == policy.device:
            return copy.deepcopy(policy).requires_grad_(False)
        return rounded_copy(policy, frozen_dtype(config.dtype), device)
    assert config.sft is not None
    dtype = frozen_dtype(config.dtype)
    reference = load_policy(config.sft, dtype, device, config.attention, computes_on=policy.device)[0]
    reference.requires_grad_(False)
    check_same_vocabulary(policy, reference, str(config.policy), str(config.sft))
    return reference


def make_anchor(config: RlhfConfig, setup: RlSetup) -> EmaAnchor:
    """The EMA anchor of a policy that has its adapters, or needs none."""
    if setup.sharded is not None:
        return divided_anchor(config, setup.sharded)
    policy = setup.rollout.policy
    if setup.base is None:
        return EmaAnchor(policy, config.anchor_memory)
    if config.lora_anchor == "factors":
        return FactorAnchor(policy, setup.base)
    return LoraAnchor(policy, setup.base, config.anchor_memory)
