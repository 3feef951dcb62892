"""Plain models without memory for weights: these are gathered from shards for as long as a model is used.

    lend(shell, weights, dtype, device)    `shell`, a skeleton, gets its weights from `weights()` when it is opened
    with opened(model):                    it has them, and may run as often as it likes
    with opened_heads(a, b):               it has what is outside the layers: embedding, last norm, head

A sharded policy is sampled from and measured as such a model, anchor, reference and reward models score as one: they
have their plain class and any dtype, none of their forward passes communicates, and between two uses they cost nothing
but the shards. One after another they take the memory of one whole model.

Opening is a collective: every process has to open the same models in the same order. Models that are not lent are left
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gemma2.posttrain.models.protocols import Network

from .units import layers_of

__all__ = ["Weights", "is_lent", "lend", "lent_weights", "opened", "opened_heads", "product_dtype"]

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
LENDER = "_lender"


@dataclass
class _Lender:
    """Where a lent model gets its weights from, and in which dtype and place it uses them."""

    weights: Weights
    dtype: torch.dtype
    device: torch.device
    is_open: bool = False


def lend(shell: Network, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Let a skeleton get its weights from `weights()`, by its names for them, tied ones once: whole or divided ones.

    dtype: that of the opened model. The shell is frozen and in eval mode from here on.
    """
    module = cast(nn.Module, shell)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    module.eval().requires_grad_(False)
    setattr(module, LENDER, _Lender(weights, dtype, device))


def _lender(model: object) -> _Lender | None:
    found: _Lender | None = getattr(model, LENDER, None)
    return found


def is_lent(model: object) -> bool:
    """Whether a model has weights only while it is opened."""
    return _lender(model) is not None


def product_dtype(model: Network) -> torch.dtype:
    """The dtype in which the layers of a model compute, autocast aside."""
    if (lender := _lender(model)) is not None:
        return lender.dtype
    if isinstance(model, FSDPModule):
        asked: torch.dtype | None = model._get_fsdp_state()._mp_policy.param_dtype
        if asked is not None:
            return asked
    return model.dtype


@torch.no_grad()
def lent_weights(model: Network) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor on the device) of a lent model, one after another. A collective over all of them."""
    lender = _lender(model)
    assert lender is not None
    for name, value in lender.weights():
        narrow = value.detach().to(lender.dtype)  # before the gather: half the bytes on the way
        whole = narrow.full_tensor() if isinstance(narrow, DTensor) else narrow
        yield name, whole.to(lender.device)


@contextmanager
def opened(*models: object) -> Iterator[None]:
    """Give lent models their weights; one that is open already stays open. The weights must not change in the block."""
    with ExitStack() as held:
        for model in models:
            if (lender := _lender(model)) is not None and not lender.is_open:
                held.enter_context(_filled(cast(Network, model), lender, frozenset()))
        yield


@contextmanager
def opened_heads(*models: object) -> Iterator[None]:
    """Give lent models what they have outside their layers, which is what `head_logits` needs."""
    with ExitStack() as held:
        for model in models:
            if (lender := _lender(model)) is not None and not lender.is_open:
                network = cast(Network, model)
                inside = {id(value) for layer in layers_of(network) for value in layer.parameters()}
                left_out = frozenset(name for name, value in network.named_parameters() if id(value) in inside)
                held.enter_context(_filled(network, lender, left_out))
        yield


@contextmanager
def _filled(model: Network, lender: _Lender, left_out: frozenset[str]) -> Iterator[None]:
    """Put the weights in their places, tensor by tensor, and take them away again."""
    empty = dict(model.named_parameters())
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, value in module.named_parameters(recurse=False):
            places.setdefault(id(value), []).append((module, leaf))

    def put(name: str, value: nn.Parameter) -> None:
        for module, leaf in places[id(empty[name])]:
            setattr(module, leaf, value)

    missing = empty.keys() - left_out
    try:
        for name, tensor in lent_weights(model):
            if name not in left_out:
                put(name, nn.Parameter(tensor, requires_grad=False))
                missing.discard(name)
        if missing:
            raise RuntimeError(f"nothing was lent for {min(missing)}")
        lender.is_open = not left_out
        yield
    finally:
        lender.is_open = False
        for name, value in empty.items():
            put(name, value)
