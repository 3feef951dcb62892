"""The output head in fp32, whatever the precision of the rest: one function for sampler, scorer, losses and KL.

    logits = c(W h + b),   c(z) = cap tanh(z / cap), or z              (Gemma 2 report, 2408.00118, section 2)

bf16 keeps 8 bits of a logit: near 20 its steps are 0.125, a noise of 0.1 nats a token and, through the maximum of the
softmax, a bias. Here a product of half precision is kept in fp32. On a CPU the factors are widened; on an accelerator
they stay narrow, and the sums of the product are not rounded. Autocast decides the precision of the factors on an
accelerator, and nothing else.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from gemma2.core.errors import InputError

from .attention import Masks
from .protocols import CausalLM

__all__ = [
    "HALF",
    "SLAB",
    "head_logits",
    "last_logits",
    "plain_head",
    "states_of_head",
    "wide_linear",
    "wide_product",
]

SLAB = 2**14  # rows of a head or of its gradient that are converted at once where dtypes differ
# Factors that other architectures apply to their logits besides a soft cap. Without effect at 1.
SCALINGS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
HALF = (torch.float16, torch.bfloat16)


def plain_head(model: CausalLM) -> bool:
    """Whether the logits of a causal LM are exactly `c(W h)`: no bias, no further scaling, no adapter."""
    head = model.get_output_embeddings()
    scaled = any(getattr(model.config, name, None) not in (None, 1) for name in SCALINGS)
    return isinstance(head, torch.nn.Linear) and head.bias is None and not scaled and not hasattr(head, "lora_A")


def head_logits(model: CausalLM, hidden: Tensor) -> Tensor:
    """Return logits (..., V) fp32 of last hidden states (..., d), soft cap included; differentiable.

    Raises InputError for a model that scales its logits in any other way.
    """
    for name in SCALINGS:
        if getattr(model.config, name, None) not in (None, 1):
            raise InputError(
                f"a model of type {model.config.model_type} scales its logits ({name}), which is not supported",
                "use a Gemma, Llama, Mistral or Qwen model",
            )
    head = model.get_output_embeddings()
    if plain_head(model):
        logits = wide_linear(hidden, head.weight)
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head(hidden.to(next(iter(head.parameters())).dtype)).float()
    return _soft_capped(logits, getattr(model.config, "final_logit_softcapping", None))


def last_logits(model: CausalLM, cache: Cache, ids: Tensor, positions: Tensor, masks: Masks) -> Tensor:
    """Return logits (B, V) fp32 after the last of ids (B, Q) at positions (B, Q), which are appended to the cache."""
    inputs = {"input_ids": ids, "attention_mask": masks, "position_ids": positions, "use_cache": True}
    if plain_head(model):
        hidden = model.base_model(**inputs, past_key_values=cache).last_hidden_state
        return head_logits(model, hidden[:, -1])
    output = model(**inputs, past_key_values=cache, logits_to_keep=1)
    logits: Tensor = output.logits
    return logits[:, -1].float()


def _soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap tanh(logits / cap), or the logits without a cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def wide_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden (..., d) @ weight.T in fp32 or better, differentiable in both."""
    states = states_of_head(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if states.dtype not in HALF:
            if weight.dtype == states.dtype:
                return F.linear(states, weight)
            return torch.cat([F.linear(states, slab.to(states.dtype)) for slab in weight.split(SLAB)], -1)
        flat = states.reshape(-1, states.shape[-1])
        result: Tensor = _WideLinear.apply(flat, weight)  # type: ignore[no-untyped-call]  # torch's own
        return result.view(*states.shape[:-1], -1)


def states_of_head(hidden: Tensor) -> Tensor:
    """Return hidden states in the dtype of the head's products: autocast's on an accelerator, on a CPU never half."""
    device = hidden.device.type
    if device == "cpu":
        return hidden.float() if hidden.dtype in HALF else hidden
    if torch.is_autocast_enabled(device):
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, two matrices of one dtype, kept in fp32 where the factors are in half precision."""
    if left.dtype not in HALF:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


class _Context(Protocol):
    """What the forward pass keeps for the backward pass."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _WideLinear(torch.autograd.Function):
    """hidden (N, d) @ weight.T of half precision, the result in fp32; gradients are products of half precision."""

    @staticmethod
    def forward(ctx: _Context, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        slabs = weight.split(SLAB) if weight.dtype != hidden.dtype else (weight,)
        return torch.cat([wide_product(hidden, slab.to(hidden.dtype).t()) for slab in slabs], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        narrow = gradient.to(hidden.dtype)
        of_hidden = wide_product(narrow, weight.to(hidden.dtype)).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        of_weight = wide_product(narrow.t(), hidden).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight
