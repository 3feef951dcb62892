"""A frozen linear layer whose weight is kept in 4 or 8 bits. y = x W.T + b in the dtype of x, or autocast's.

    4    NF4, blocks of 64 (nf4.py)
    8    W ~ q s,   q: int8 in -127 .. 127, s: fp32, one for each output, the largest magnitude / 127; 8 bits and a bit.
         Only weights: LLM.int8() (2208.07339) also rounds activations, through fp16, in which Gemma 2's overflow, and
         its outliers depend on the rows of a batch, so that a log-prob would depend on the company of its row

The weight is formed anew for every product, and again in the backward pass; nothing of it is kept. To peft the layer is
an ordinary `nn.Linear`, so adapters, their products and their dtype are those of every other LoRA training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nf4 import FourBitWeight

__all__ = ["Bits", "QuantisedLinear", "dequantised"]

Bits = Literal[4, 8]


class EightBitWeight:
    """The scales of a matrix in 8 bits. Same members as `FourBitWeight`."""

    def __init__(self, weight: Tensor) -> None:
        """Quantise a matrix (out, in) fp32 or bf16. Its dtype is that of `dequantised`."""
        self.dtype = weight.dtype
        wide = weight.detach().float()
        self.scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        self.packed = (wide / self.scale).round_().to(torch.int8)

    def dequantised(self, packed: Tensor) -> Tensor:
        """Return the matrix (out, in). `packed`: the elements, wherever the layer keeps them."""
        return (packed * self.scale).to(self.dtype)

    def product(self, x: Tensor, packed: Tensor) -> Tensor | None:
        """Return None: no kernel is used."""
        return None

    def __deepcopy__(self, memo: dict[int, object]) -> EightBitWeight:
        """Return the same object: it does not change, and a copy of a layer shares it."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the scales; the layer moves the elements."""
        self.scale = self.scale.to(device)

    def scale_bytes(self) -> int:
        """Return the bytes of the scales."""
        return self.scale.numel() * self.scale.element_size()


class QuantisedLinear(nn.Linear):
    """A linear layer with its weight in 4 or 8 bits; it does not learn. `weight` holds the elements, packed."""

    def __init__(self, linear: nn.Linear, bits: Bits, device: torch.device) -> None:
        """Quantise `linear` on a device. Its weight is fp32 or bf16; so is the one that products are formed with."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach().to(device)
        self.quantised = FourBitWeight(weight) if bits == 4 else EightBitWeight(weight)
        self.weight = nn.Parameter(self.quantised.packed, requires_grad=False)
        del self.quantised.packed  # the parameter moves with the module
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
        self.bits = bits

    def dequantised(self) -> Tensor:
        """Return the weight (out, in) that products are formed with, in the dtype of the weight that was quantised."""
        return self.quantised.dequantised(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return x W.T + b (..., out) of x (..., in)."""
        device = input.device.type
        x = input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(device, enabled=False):
            if torch.is_grad_enabled() and x.requires_grad:
                product: Tensor = _FrozenProduct.apply(x, self.dequantised)  # type: ignore[no-untyped-call]
            else:
                found = self.quantised.product(x, self.weight)
                product = F.linear(x, self.dequantised().to(x.dtype)) if found is None else found
        return product if bias is None else product + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module; scales keep their dtype when the rest is cast."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.quantised.to(self.weight.device)
        return self

    def stored_bytes(self) -> int:
        """Return the bytes of elements, scales and bias."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() * self.weight.element_size() + self.quantised.scale_bytes() + bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def dequantised(linear: nn.Linear) -> Tensor:
    """Return the weight (out, in) of a linear layer, formed anew if it is quantised."""
    return linear.dequantised() if isinstance(linear, QuantisedLinear) else linear.weight


class _ProductContext(Protocol):
    """What the forward pass keeps for the backward pass."""

    weight: Callable[[], Tensor]


class _FrozenProduct(torch.autograd.Function):
    """x (..., in) @ W.T; the gradient of x needs W, which is formed again."""

    @staticmethod
    def forward(ctx: _ProductContext, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight().to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _ProductContext, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight().to(gradient.dtype), None
