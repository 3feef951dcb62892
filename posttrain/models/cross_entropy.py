"""Cross-entropy of chosen positions from last hidden states, loss and gradient in one pass over chunks of logits.

    L = - sum_i w_i log p_i(y_i),   p_i = softmax(x_i),   x_i = c(W h_i) / T,   c(z) = cap tanh(z / cap), or z
    dL/dz_i = w_i / T (p_i - onehot(y_i)) (1 - tanh(z_i / cap)^2),   z_i = W h_i
    entropy_i = log sum exp x_i - p_i x_i                     soft cap: Gemma 2 report (2408.00118), section 2

T is the temperature of sampling. The weights w carry no gradient: a constant in SFT, the advantage of its sequence in
RL. The logits of a chunk exist once: their gradient replaces them and is added to the gradients of h and W before the
next chunk is formed. So the head costs three matrix products, where a loss that forms its logits again in the backward
pass costs four. Everything between the products is done on tiles of rows, which stay in the caches.

Deviation from TRL 1.16, whose head scores every position if Triton is missing: only targets are scored. Gradients
agree to rounding (tests/posttrain/models/test_cross_entropy.py).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .protocols import CausalLM

__all__ = ["summed_cross_entropy", "target_logps", "weighted_cross_entropy"]

CHUNK = 2**24  # logits held at once: 64 MiB in fp32,
ROWS = 128  # but no fewer rows: each chunk reads W and writes its gradient once
TILE = 2**22  # logits processed at once between two products: 16 MiB


def summed_cross_entropy(
    model: CausalLM, hidden: Tensor, targets: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scale * sum of -log pi, with gradient; log pi (N,); whether each target is the mode (N,)); fp32 nats.

    hidden: last hidden states (N, d); targets: (N,) ids. `model` must have a `plain_head`.
    """
    weights = torch.full((len(targets),), scale, dtype=_exact(hidden), device=hidden.device)
    loss, logps, hits, _ = _apply(model, hidden, targets, weights, 1.0, False)
    return loss, logps, hits


def weighted_cross_entropy(
    model: CausalLM, hidden: Tensor, targets: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of -weight * log pi, with gradient in the states and the head; log pi (N,); entropies (N,)), in nats.

    hidden: last hidden states (N, d); targets: (N,) ids; weights: (N,). `model` must have a `plain_head`. fp32, or fp64
    for states in fp64.
    """
    loss, logps, _, entropies = _apply(model, hidden, targets, weights, temperature, True)
    return loss, logps, entropies


@torch.no_grad()
def target_logps(model: CausalLM, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return log pi (N,) of `targets`, nats, without gradient. Arguments as above."""
    return _apply(model, hidden, targets, hidden.new_ones(len(targets)), temperature, False)[1]


class _Form(NamedTuple):
    """The constants of a call. `learns`: gradients are wanted; needs_input_grad does not respect no_grad."""

    cap: float | None
    temperature: float
    entropies: bool
    learns: bool

    @property
    def before(self) -> float:
        """Return the factor of the states before the product with W."""
        return 1.0 / (self.temperature if self.cap is None else self.cap)

    @property
    def after(self) -> float:
        """Return the factor of the result of product and tanh."""
        return 1.0 if self.cap is None else self.cap / self.temperature


def _apply(
    model: CausalLM, hidden: Tensor, targets: Tensor, weights: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = _Form(
        getattr(model.config, "final_logit_softcapping", None), temperature, entropies, torch.is_grad_enabled()
    )
    weight = model.get_output_embeddings().weight
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _CrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's own
        hidden, weight, targets, weights, form
    )
    return result


class _CrossEntropyContext(Protocol):
    """The gradients that the forward pass keeps for the backward pass, in addition to autograd's own members."""

    needs_input_grad: tuple[bool, ...]
    to_hidden: Tensor | None
    to_weight: Tensor | None

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _CrossEntropy(torch.autograd.Function):
    """Loss, log-probs, hits and entropies of `_apply`, with the backward pass of the loss."""

    @staticmethod
    def forward(
        ctx: _CrossEntropyContext, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, form: _Form
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (form.learns and needed for needed in ctx.needs_input_grad[:2])
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = torch.zeros_like(weight) if wants_weight else None
        exact = _exact(hidden)
        logps, entropies = (torch.zeros(len(targets), dtype=exact, device=hidden.device) for _ in range(2))
        hits = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        factors = (weights / form.temperature)[:, None]
        size = min(len(targets), max(ROWS, CHUNK // len(weight)))
        # Fresh memory for every chunk would cost as much as the arithmetic: the pages have to be mapped each time.
        logits, space = hidden.new_empty(size, len(weight)), _tile(size, len(weight), exact, hidden)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            states = hidden[part]
            chunk = torch.mm(states * form.before, weight.T, out=logits[: len(states)])
            for first in range(0, len(states), len(space)):
                tile = slice(first, first + len(space))
                at = slice(start + first, start + min(first + len(space), len(states)))
                logps[at], hits[at], entropies[at] = _tile_of(
                    chunk[tile], targets[at], form, space, wants_hidden or wants_weight
                )
            if to_hidden is not None:
                torch.mm(chunk, weight, out=to_hidden[part]).mul_(factors[part])
            if to_weight is not None:
                to_weight.addmm_(chunk.T, (states * factors[part]).to(states.dtype))
        ctx.to_hidden, ctx.to_weight = to_hidden, to_weight
        ctx.mark_non_differentiable(logps, hits, entropies)
        return -(weights * logps).sum(), logps, hits, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: _CrossEntropyContext, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden = ctx.to_hidden.mul_(upstream) if ctx.to_hidden is not None else None
        to_weight = ctx.to_weight.mul_(upstream) if ctx.to_weight is not None else None
        del ctx.to_hidden, ctx.to_weight
        return to_hidden, to_weight, None, None, None


def _exact(hidden: Tensor) -> torch.dtype:
    """Return the dtype that sums over a vocabulary need: fp32, or fp64 for states in fp64."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _tile(rows: int, vocabulary: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Allocate memory for the probabilities of a tile of rows."""
    return like.new_empty(min(rows, max(1, TILE // vocabulary)), vocabulary, dtype=dtype)


def _tile_of(
    raw: Tensor, targets: Tensor, form: _Form, space: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return (log pi (n,) of the targets; whether each is the mode (n,); entropies (n,), or 0 if not requested).

    raw: (n, V), the result of the product. With `gradient` it becomes the gradient of -sum log pi in W h / T.
    """
    inner = raw.to(space.dtype)  # `raw` itself, unless the states are of half precision
    if form.cap is not None:
        inner.tanh_()
    probs = torch.mul(inner, form.after, out=space[: len(inner)])
    chosen, mode = probs.gather(1, targets[:, None]).squeeze(1), probs.amax(-1)
    torch.softmax(probs, -1, out=probs)
    # The mode's probability is never too small for a logarithm; that of a target may be.
    total = mode - probs.amax(-1).log()  # log sum exp
    entropies = total - form.after * torch.linalg.vecdot(probs, inner) if form.entropies else 0.0
    if gradient:
        probs.scatter_add_(1, targets[:, None], probs.new_full((len(probs), 1), -1.0))
        if form.cap is not None:
            torch.addcmul(probs, probs, inner.square_(), value=-1, out=inner)
        else:
            inner.copy_(probs)
        if inner is not raw:
            raw.copy_(inner)
    return chosen - total, chosen >= mode, entropies
