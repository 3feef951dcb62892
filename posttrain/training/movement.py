"""How far training moved the weights: |theta - theta_start| / |theta_start|, over the trained tensors that changed.

Adapted layers count as what they compute: the change is the LoRA product, the start is the weight that it is added to.
Of every other trained tensor at most 2^16 elements are kept from the start, evenly spaced, and stand for the whole
tensor: a copy of the start would double the memory of the weights. Of weights that are divided over processes each
samples its part, and the squares of all are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.core.ranks import ALONE, Ranks
from gemma2.core.rounding import relative_change
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import Network
from gemma2.posttrain.quantisation.quantised_linear import dequantised
from gemma2.posttrain.sharding.units import is_sharded, local

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["Movement"]

SAMPLE = 2**16  # elements per tensor


class Movement:
    """A sample of a model's trained weights before training. `ranks`: the processes that may hold parts of them."""

    def __init__(self, model: Network, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.start = {name: _sample(parameter) for name, parameter in _trained(model)}

    @torch.no_grad()
    def relative(self, model: Network) -> float | None:
        """Return the relative change of a model's weights since the start; None if there is nothing to compare."""
        pairs = list(_products(model))
        for name, parameter in _trained(model):
            if name in self.start and (before := self.start[name]).shape == (after := _sample(parameter)).shape:
                scale = local(parameter).numel() / max(before.numel(), 1)
                pairs.append((_square(after - before) * scale, _square(before) * scale))
        if is_sharded(plain_model(model)):  # each has squares of its parts, in the same order
            parts = zip(*self.ranks.gather(pairs), strict=True)
            pairs = [(sum(change for change, _ in part), sum(start for _, start in part)) for part in parts]
        return relative_change(pairs)


def _trained(model: Network) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            yield name, parameter


def _sample(parameter: Tensor) -> Tensor:
    flat = local(parameter.detach()).reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLE))].double().cpu()


def _square(values: Tensor) -> float:
    return float(local(values).double().square().sum())


def _products(model: Network) -> Iterator[tuple[float, float]]:
    """(|s B A|^2, |W|^2) of every adapted layer; the products are 0 at the start."""
    for module in plain_model(model).modules():
        if hasattr(module, "lora_A"):
            layer: LoraLayer = module
            (adapter,) = layer.active_adapters
            yield _square(layer.get_delta_weight(adapter)), _square(dequantised(layer.get_base_layer()))
