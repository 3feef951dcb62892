"""The weights of a sharded policy with LoRA adapters, by their names in the plain model: W, s B A, W + s B A in shards.

A process forms its rows of a product from its rows of B and all of A: A is gathered, rank x inputs numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from gemma2.core.outputs.safetensors_header import read_header, weight_files
from gemma2.posttrain.models.protocols import Network

from .into_shards import whole_name
from .units import gathered
from .whole_files import OutputTensor

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["adapted_shards", "adapter_state", "changed_values", "factors_of", "frozen_shards", "product_shards"]

Formed = Callable[[], Tensor]


def factors_of(model: Network) -> dict[str, Tensor]:
    """The factors A and B of a model's adapters by name, fp32 in shards: the parameters' own memory."""
    return {name: value.data for name, value in model.named_parameters() if ".lora_" in name}


def frozen_shards(model: Network) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the plain model, value) of every parameter that is not a factor; adapted weights without it."""
    for name, value in model.named_parameters():
        if ".lora_" not in name:
            yield whole_name(name), value.data


def product_shards(model: Network, factors: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Formed]]:
    """Yield (name in the plain model, function that returns s B A in fp32) of every adapted weight.

    factors: others than the model's, by the names of `factors_of`.
    """
    own = factors_of(model) if factors is None else factors
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer = cast("LoraLayer", module)
            (adapter,) = layer.active_adapters
            a, b = (own[f"{name}.lora_{side}.{adapter}.weight"] for side in "AB")
            yield f"{name}.weight", _product(a, b, float(layer.scaling[adapter]))


def _product(a: Tensor, b: Tensor, scale: float) -> Formed:
    def form() -> Tensor:
        with torch.no_grad():
            wide: Tensor = a.detach().float()
            if isinstance(wide, DTensor):
                wide = wide.redistribute(placements=[Replicate()] * wide.device_mesh.ndim)
            return b.detach().float() @ wide * scale

    return form


def adapted_shards(model: Network, factors: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the plain model, W + s B A in fp32) of every adapted weight."""
    for name, product in product_shards(model, factors):
        layer = cast("LoraLayer", model.get_submodule(name.removesuffix(".weight")))
        yield name, cast(Tensor, layer.get_base_layer().weight).detach().float() + product()


def adapter_state(model: Network) -> dict[str, Tensor]:
    """The factors, gathered, under the names of peft's wrapper; empty tensors but on rank 0. A collective."""
    found = gathered(_OnlyFactors(model))  # type: ignore[arg-type]  # of a network, its parameters are all that is read
    return {f"base_model.model.{name}": value for name, value in found}


class _OnlyFactors:
    """The factors of a model as all its parameters."""

    def __init__(self, model: Network) -> None:
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.model.named_parameters():
            if ".lora_" in name:
                yield name, value


def changed_values(
    path: Path,
    plan: list[OutputTensor],
    is_main: bool,
    added: Mapping[str, Formed],
    put: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's files in fp32 with some changed, in the order of `plan`. A collective.

    The files are read again, on rank 0 alone: what is frozen may be held rounded. added: what is added to the value of
    the file; put: what takes its place. Other processes get empty tensors.
    """
    places = {name: file for file in weight_files(path) for name in read_header(file)} if is_main else {}
    for item in plan:
        given = (put or {}).get(item.name)
        formed = added.get(item.name)
        change = given if given is not None else formed() if formed is not None else None
        whole = change.full_tensor() if isinstance(change, DTensor) else change
        if not is_main:
            yield item.name, torch.empty(0)
            continue
        if given is not None and whole is not None:
            yield item.name, whole.detach().float().cpu()
            continue
        with safe_open(places[item.name], framework="pt") as opened:
            value = opened.get_tensor(item.name).float()
        yield item.name, value if whole is None else value + whole.cpu()
