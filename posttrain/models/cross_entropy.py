"""Cross-entropy of chosen positions from last hidden states, loss and gradient in one pass over chunks of logits.

    L = - scale * sum_i log softmax(c(W h_i))[y_i],     c(z) = cap * tanh(z / cap), or z without a soft cap
    dL/dz_i = scale * (softmax(c(z_i)) - onehot(y_i)) * (1 - tanh(z_i / cap)^2)
                                                              soft cap: Gemma 2 report (2408.00118), section 2

The logits of a chunk exist once: their gradient replaces them, and goes into the gradients of h and W before the next
chunk is formed. So the head costs three matrix products, where a loss that forms its logits again in the backward pass
costs four, and no more than `CHUNK` logits are ever held.

Deviation from TRL 1.16, whose head scores every position where there is no Triton: only targets are scored. Gradients
agree to rounding (tests/posttrain/models/test_cross_entropy.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["plain_head", "summed_cross_entropy"]

CHUNK = 2**24  # logits held at once: 64 MiB in fp32, and as much again under a soft cap
# What other architectures do to their logits besides a soft cap.
SCALINGS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def plain_head(model: Any) -> bool:
    """Whether the logits of a causal LM are `c(W h)` and nothing else: no bias, no further scaling, no adapter."""
    head = model.get_output_embeddings()
    scaled = any(getattr(model.config, name, None) is not None for name in SCALINGS)
    return isinstance(head, torch.nn.Linear) and head.bias is None and not scaled


def summed_cross_entropy(
    model: Any, hidden: Tensor, targets: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale * sum of -log pi, fp32 nats, with gradient; log pi (N,) fp32 nats; whether each target is the mode (N,)).

    hidden: last hidden states (N, d); targets: (N,) ids. `model` has a `plain_head`.
    """
    cap = getattr(model.config, "final_logit_softcapping", None)
    weight = model.get_output_embeddings().weight
    loss, logps, hits = _CrossEntropy.apply(hidden, weight, targets, cap, scale, torch.is_grad_enabled())
    return loss, logps, hits


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, scale: float, learns: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # needs_input_grad knows nothing of no_grad.
        wants_hidden, wants_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = torch.zeros_like(weight) if wants_weight else None
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        hits = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        size = min(len(targets), max(1, CHUNK // weight.shape[0]))
        # Fresh memory for every chunk would cost as much as the arithmetic: the pages have to be mapped each time.
        buffers = hidden.new_empty(2 if cap is None else 3, size, weight.shape[0])
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            states = hidden[part]
            space = buffers[:, : len(states)]
            torch.mm(states, weight.T, out=space[0])
            logps[part], hits[part], gradient = _chunk(space, targets[part], cap, wants_hidden or wants_weight)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part])
            if to_weight is not None:
                to_weight.addmm_(gradient.T, states)
        ctx.to_hidden, ctx.to_weight, ctx.scale = to_hidden, to_weight, scale
        ctx.mark_non_differentiable(logps, hits)
        return -scale * logps.sum(), logps, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factor = ctx.scale * upstream
        to_hidden = ctx.to_hidden.mul_(factor) if ctx.to_hidden is not None else None
        to_weight = ctx.to_weight.mul_(factor) if ctx.to_weight is not None else None
        del ctx.to_hidden, ctx.to_weight
        return to_hidden, to_weight, None, None, None, None


def _chunk(space: Tensor, targets: Tensor, cap: float | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log pi (n,) of the targets, whether each is the mode (n,), the gradient (n, V) of -sum log pi in the raw logits.

    space: (2 or, under a soft cap, 3, n, V) memory that is overwritten; the raw logits come in space[0].
    """
    logits, logps = space[0], space[1]
    if cap is not None:
        bounded = logits.div_(cap).tanh_()
        logits = torch.mul(bounded, cap, out=space[2])
    torch.log_softmax(logits, -1, out=logps)
    chosen = logps.gather(1, targets[:, None])
    hits = chosen.squeeze(1) >= logps.amax(-1)
    if gradient:
        logps.exp_()
        logps.scatter_add_(1, targets[:, None], torch.full_like(chosen, -1.0))
        if cap is not None:
            torch.addcmul(logps, logps, bounded.square_(), value=-1, out=logps)
    return chosen.squeeze(1), hits, logps
