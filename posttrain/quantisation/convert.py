"""Quantises the linear layers of a model, and measures what that changes.

Embeddings, norms, the output head (the embedding, where they are tied) and a classifier's head stay as they are: an
error of the head is an error of every logit, and a tied head is looked up as an embedding as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gemma2.core.errors import InputError

from .nf4 import require_bitsandbytes
from .quantised_linear import Bits, QuantisedLinear

__all__ = ["WORST", "QuantisationError", "quantise", "quantised_layers"]

# Largest relative error of a matrix. NF4 of normal weights has 0.09, of a few large elements among small ones 0.2.
WORST = {4: 0.35, 8: 0.05}
HEADS = ("lm_head", "score")


@dataclass(frozen=True)
class QuantisationError:
    """How far the weights of a quantised model are from those of its directory.

    relative        |W' - W| / |W| over all quantised matrices
    worst, layer    the largest of one matrix, and its name
    matrices, bytes how many, and what they take now
    """

    bits: int
    relative: float
    worst: float
    layer: str
    matrices: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.matrices} matrices in {self.bits} bits: relative error {self.relative:.2g}, "
            f"at most {self.worst:.2g} ({self.layer})"
        )


def quantise(model: nn.Module, bits: Bits, device: torch.device) -> QuantisationError:
    """Replace the linear layers of a model, except heads, by `QuantisedLinear` on a device, one after the other.

    Raises UsageError without bitsandbytes (4 bits), InputError for a matrix that is not what comes back from its
    quantised form, as with weights that are not finite or a kernel that is broken.
    """
    if bits == 4:
        require_bitsandbytes()
    squares, total, worst, layer, matrices, taken = 0.0, 0.0, 0.0, "", 0, 0
    for name in list(_linear_layers(model)):
        linear = cast(nn.Linear, model.get_submodule(name))
        narrow = QuantisedLinear(linear, bits, device)
        wide = linear.weight.detach().to(device)
        square, size = _square(narrow.dequantised().float() - wide.float()), _square(wide)
        error = math.sqrt(square / size) if size else 0.0 if square == 0 else math.inf
        if not error <= WORST[bits]:
            raise InputError(
                f"{name} has a relative error of {error:.2g} in {bits} bits", "train without --base-bits, or with 8"
            )
        squares, total, matrices, taken = squares + square, total + size, matrices + 1, taken + narrow.stored_bytes()
        if error >= worst:
            worst, layer = error, name
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, narrow)
        del linear, wide  # before the next one is made
    return QuantisationError(bits, math.sqrt(squares / total) if total else 0.0, worst, layer, matrices, taken)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """Yield the quantised layers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield name, module


def _linear_layers(model: nn.Module) -> Iterator[str]:
    heads = [getattr(model, name, None) for name in HEADS]
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not any(module is head for head in heads):
            yield name


def _square(values: Tensor) -> float:
    """Sum of squares, in fp64, without a copy of the whole in it."""
    return math.fsum(float(row.double().square().sum()) for row in values.split(1024))
