"""The EMA anchor of a policy whose weights are divided over processes: in fp32, on the shards of each.

    ema <- (1 - mu) ema + mu theta         element by element: a process averages its part, and nothing is sent

What scores is a plain model that the average is lent to (`sharding/lending.py`). Under LoRA the average is that of
W + s B A, or of the factors, alone; what is not adapted is lent by the policy. Bit for bit the average of the gathered
weights.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import chain

import torch
from torch.distributed.tensor import DTensor

from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.sharding.adapter_shards import adapted_shards, factors_of, frozen_shards
from gemma2.posttrain.sharding.divided_models import Shards
from gemma2.posttrain.sharding.lending import Weights, lend
from gemma2.posttrain.sharding.units import ShardLayout, local

from .ema import EmaAnchor, Theta

__all__ = ["ShardedAnchor", "ShardedFactorAnchor", "ShardedLoraAnchor"]


class ShardedAnchor(EmaAnchor):
    """The average of a policy that is trained in full.

    shards: fp32, of the policy at its start; shell: a skeleton of it, which scores; dtype: that in which it scores.
    """

    def __init__(self, shards: Shards, shell: CausalLM, layout: ShardLayout, dtype: torch.dtype) -> None:
        self._lend(shards, shell, lambda: iter(self.shadow.items()), layout, dtype)

    def _lend(self, shards: Shards, shell: CausalLM, weights: Weights, layout: ShardLayout, dtype: torch.dtype) -> None:
        lend(shell, weights, dtype, layout.device)
        self.model, self.memory, self.shadow = shell, "gpu", shards

    @torch.no_grad()
    def update(self, policy: CausalLM, mu: float) -> None:
        """One step of the average on the shards of this process. policy: the sharded one."""
        pairs = [(self.shadow[name], value) for name, value in self.theta(policy)]
        for average, value in pairs:
            # A whole tensor in the place of a shard is one that a forward pass left gathered.
            if not (isinstance(average, DTensor) and isinstance(value, DTensor)):
                raise RuntimeError("the anchor is updated while weights are whole")
            if average.placements != value.placements or average.device_mesh != value.device_mesh:
                raise RuntimeError(f"policy and anchor are not divided alike: {value.placements}, {average.placements}")
        averages = [local(average) for average, _ in pairs]
        torch._foreach_lerp_(averages, [local(value).to(torch.float32) for _, value in pairs], mu)


class ShardedLoraAnchor(ShardedAnchor):
    """The exact average of a LoRA policy, of the products. policy: the sharded one, with its adapters."""

    def __init__(self, policy: CausalLM, shell: CausalLM, layout: ShardLayout, dtype: torch.dtype) -> None:
        shards = {name: value.clone() for name, value in adapted_shards(policy)}
        self._lend(shards, shell, lambda: chain(_others(policy, shards), shards.items()), layout, dtype)

    def theta(self, policy: CausalLM) -> Theta:
        yield from adapted_shards(policy)


class ShardedFactorAnchor(ShardedAnchor):
    """The factor-wise approximation: averages of A and of B."""

    def __init__(self, policy: CausalLM, shell: CausalLM, layout: ShardLayout, dtype: torch.dtype) -> None:
        shards: Shards = {name: value.detach().clone() for name, value in factors_of(policy).items()}
        adapted = {name for name, _ in adapted_shards(policy)}
        weights = lambda: chain(_others(policy, adapted), adapted_shards(policy, shards))  # noqa: E731
        self._lend(shards, shell, weights, layout, dtype)

    def theta(self, policy: CausalLM) -> Theta:
        yield from factors_of(policy).items()


def _others(policy: CausalLM, adapted: Container[str]) -> Theta:
    """The weights that a policy and its anchor share: those without adapters."""
    return ((name, value) for name, value in frozen_shards(policy) if name not in adapted)
