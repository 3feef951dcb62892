"""The models of an RL run whose weights are divided over processes (`posttrain/sharding`).

    trained      the policy, FSDP2 units: fp32 weights, gradients and moments in shards; adapters before it is divided
    lent         a plain model that samples, one that is measured, anchor, reference, reward models: whole one after
                 another, for as long as they are used
    anchor       fp32 shards; under LoRA of the adapted weights alone
    reference    shards in the dtype that it is measured in; under LoRA, where it is the start, the policy's frozen ones

On an accelerator products are bf16, and so are the frozen shards under LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.evaluation.evaluate import check_same_vocabulary
from gemma2.posttrain.models.loading import load_tokenizer
from gemma2.posttrain.models.lora import check_targets, lora_config
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.sharding.adapter_shards import adapted_shards, frozen_shards
from gemma2.posttrain.sharding.divided_models import divided_policy, empty_policy, read_shards
from gemma2.posttrain.sharding.lending import lend
from gemma2.posttrain.sharding.placement import Placement
from gemma2.posttrain.sharding.units import ShardLayout

from .ema import EmaAnchor
from .rollout import Rollout
from .sharded_anchor import ShardedAnchor, ShardedFactorAnchor, ShardedLoraAnchor

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["ShardedParts", "divided_anchor", "divided_models"]


@dataclass(frozen=True)
class ShardedParts:
    """What a run has besides `RlSetup` where its models are divided.

    trained: the sharded policy, its adapters in its layers; measured: the plain model that evaluations run, which it
    lends its weights to; adapters: peft's wrapper of it; compute: dtype of the products.
    """

    layout: ShardLayout
    trained: CausalLM
    measured: CausalLM
    adapters: PeftModel | None
    compute: torch.dtype


def divided_models(
    config: RlhfConfig, prompts: Sequence[Prompt], micro: int, placement: Placement, starts_at_sft: bool
) -> tuple[Rollout, CausalLM, ShardedParts]:
    """Read policy, SFT policy and reward into shards: (rollout, reference, parts). A collective.

    Raises InputError for unusable models, UsageError for adapters that no layer can have.
    """
    layout = placement.layout
    assert layout is not None
    half = layout.device.type != "cpu" and bool(config.trainer.get("bf16", True))
    compute, measured_in = torch.bfloat16 if half else torch.float32, frozen_dtype(config.dtype)
    trained, adapters = _trained_policy(config, layout, compute)
    weights = lambda: current_weights(trained)  # noqa: E731
    drawing, measured = (empty_policy(config.policy, attention=config.attention) for _ in range(2))
    lend(drawing, weights, compute, layout.device)
    lend(measured, weights, measured_in, layout.device)
    reference, anchor = (empty_policy(config.sft or config.policy, attention=config.attention) for _ in range(2))
    if config.lora_rank and starts_at_sft:
        before = lambda: frozen_shards(trained)  # noqa: E731
    else:
        # Rounded once is as good as rounded whenever they are opened, unless one of both dtypes is fp32.
        stored = torch.bfloat16 if {compute, measured_in} == {torch.bfloat16} else torch.float32
        source = config.sft or config.policy
        shards = read_shards(empty_policy(source, stored), source, layout)
        before = lambda: iter(shards.items())  # noqa: E731
    lend(reference, before, measured_in, layout.device)
    lend(anchor, before, compute, layout.device)
    if config.sft is not None and not starts_at_sft:
        check_same_vocabulary(drawing, reference, str(config.policy), str(config.sft))
    chat = ChatFormat(load_tokenizer(config.policy), drawing.generation_config)
    generator = torch.Generator().manual_seed(config.seed)
    score = reward_score(config, chat, micro, layout)
    scores = anchor if config.anchor == "sft" else None
    rollout = Rollout(drawing, scores, chat, score, config, prompts, generator, micro, placement.ranks)
    return rollout, reference, ShardedParts(layout, trained, measured, adapters, compute)


def _trained_policy(config: RlhfConfig, layout: ShardLayout, compute: torch.dtype) -> tuple[CausalLM, PeftModel | None]:
    """The policy in shards; adapters get the values that one process would draw."""
    wrapped: list[PeftModel] = []

    def adapt(model: CausalLM) -> None:
        check_targets(config, model)
        settings = lora_config(config, "CAUSAL_LM")
        if settings is not None:
            from peft import get_peft_model

            transformers.set_seed(config.seed)
            wrapped.append(get_peft_model(model, settings))

    stored = compute if config.lora_rank else torch.float32  # what is frozen is never updated
    mixed = compute if compute != torch.float32 else None
    policy = divided_policy(config.policy, layout, stored, mixed, adapt, config.attention)
    return policy, wrapped[0] if wrapped else None


def current_weights(policy: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """The weights of a sharded policy by their names in the plain model, products of adapters added in fp32."""
    adapted = {name for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    plain = ((name, value) for name, value in frozen_shards(policy) if name.removesuffix(".weight") not in adapted)
    return chain(plain, adapted_shards(policy))


def divided_anchor(config: RlhfConfig, parts: ShardedParts) -> EmaAnchor:
    """The EMA anchor of a sharded policy, at its start."""
    shell, layout, compute = empty_policy(config.policy, attention=config.attention), parts.layout, parts.compute
    if config.lora_rank == 0:
        shards = read_shards(empty_policy(config.policy), config.policy, layout)
        return ShardedAnchor(shards, shell, layout, compute)
    kind = ShardedFactorAnchor if config.lora_anchor == "factors" else ShardedLoraAnchor
    return kind(parts.trained, shell, layout, compute)
