"""Divergences between next-token distributions, with gradients, in chunks: 256k logits never exist for a whole batch.

    forward-kl   KL(T || S)                                        d/dz = S - T
    reverse-kl   KL(S || T)                                        d/dz = S (log S/T - KL(S || T))
    jsd          b KL(T || m) + (1 - b) KL(S || m)                 d/dz = (1 - b) S (log S/m - KL(S || m))
                 m = b T + (1 - b) S;  JSD(b) / b -> KL(T || S) for b -> 0,  JSD(b) / (1 - b) -> KL(S || T) for b -> 1
                                                                   (GKD, 2306.13649, equation 1)
    T, S = softmax(cap tanh(h W / cap) / temperature)              z: the logits after cap and temperature

The temperature is applied to both sides, after the soft cap, as in the model; no factor temperature^2 is added
(Hinton et al. 2015 add one to keep the scale of mixed losses). Everything after the products is fp32.

The loss is linear in its positions, so the gradient of a chunk of logits is known with the chunk: it is taken in the
forward pass, and each chunk is projected once. TRL's chunked loss tiles the vocabulary too and projects 2 or 3 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gemma2.posttrain.models.head import SLAB, states_of_head, wide_product
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.scorer import CHUNK

__all__ = ["Divergence", "FullTarget", "Head", "Measured", "Target", "TopkTarget", "divergence_loss", "head_of"]


@dataclass(frozen=True)
class Divergence:
    """Which divergence; `beta` is the weight of the teacher in the mixture of `jsd`."""

    kind: Literal["forward-kl", "reverse-kl", "jsd"]
    beta: float = 0.5

    def __call__(self, logps: Tensor, probs: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Values (K,) in nats and their gradients (K, V) with respect to the student's logits.

        logps, probs: the student's, (K, V); teacher: log-probs (K, V). All three are overwritten.
        """
        if self.kind == "forward-kl":
            return _forward_kl(logps, probs, teacher)
        if self.kind == "reverse-kl":
            return _reverse_kl(logps, probs, teacher)
        return _jsd(logps, probs, teacher, self.beta)


def _forward_kl(logps: Tensor, probs: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    targets = teacher.exp()
    return _dot(targets, teacher.sub_(logps)), probs.sub_(targets)


def _reverse_kl(logps: Tensor, probs: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    gap = logps.sub_(teacher)
    values = _dot(probs, gap)
    return values, gap.sub_(values[:, None]).mul_(probs)


def _jsd(logps: Tensor, probs: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """With d = log T/S: log m/S = log(b e^d + 1 - b), exactly 0 at d = 0 and finite for any d."""
    targets = teacher.exp()
    d = teacher.sub_(logps)
    share = torch.where(d > 0, d.new_tensor(1 - beta), d.new_tensor(beta))
    ratio = d.abs().neg_().expm1_().mul_(share).log1p_().add_(d.clamp(min=0))  # log m/S
    to_mixture = -_dot(probs, ratio)  # KL(S || m)
    values = beta * _dot(targets, d.sub_(ratio)) + (1 - beta) * to_mixture
    return values, ratio.neg_().sub_(to_mixture[:, None]).mul_(probs).mul_(1 - beta)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise products (K,), without the (K, V) product in memory."""
    return torch.bmm(left[:, None], right[:, :, None]).flatten()


@dataclass(frozen=True)
class Head:
    """The last layer of a model: weight (V, d), soft cap or None, and the temperature of the divergence."""

    weight: Tensor
    cap: float | None
    temperature: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (K, V) of hidden states (K, d), fp32 or better, soft cap and temperature applied."""
        logits = _product(hidden, self.weight)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def slope_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn d/d(logits) into d/d(hidden @ weight.T), in place; `logits` are overwritten."""
        if self.cap is not None:  # d/dx cap tanh(x / cap) = 1 - tanh^2
            gradient.mul_(logits.mul_(self.temperature / self.cap).square_().neg_().add_(1))
        return gradient if self.temperature == 1 else gradient.div_(self.temperature)


def head_of(model: CausalLM, temperature: float = 1.0, size: int | None = None) -> Head:
    """The head of a causal language model, its first `size` rows where that is given."""
    weight = model.get_output_embeddings().weight
    cap = getattr(model.config, "final_logit_softcapping", None)
    return Head(weight if size is None else weight[:size], cap, temperature)


class Target(Protocol):
    """The distributions that the student is compared with, at N response positions."""

    def compare(self, rows: slice, logps: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Values (K,) and gradients (K, V) for the student's logits; its logps and probs (K, V) are overwritten."""
        ...


@dataclass(frozen=True)
class FullTarget:
    """A teacher's whole distributions, made chunk by chunk from its hidden states (N, d')."""

    hidden: Tensor
    head: Head
    divergence: Divergence

    def compare(self, rows: slice, logps: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Target`."""
        return self.divergence(logps, probs, torch.log_softmax(self.head.logits(self.hidden[rows]), -1))


@dataclass(frozen=True)
class TopkTarget:
    """Teacher log-probs of its k most probable tokens and of all others together.

    ids: (N, k) int64; logps: (N, k + 1) fp32 nats, the last for the others. The student's tokens fall into the same
    k + 1 buckets. What is lost, with r the teacher's mass outside the top k: forward KL is r KL(T_tail || S_tail) too
    low, both conditional on the tail, and its gradient with respect to the logits is off by r |T_tail - S_tail|_1 <= 2r
    in the 1-norm. Merging buckets raises no divergence, so each is a lower bound of the full one.
    """

    ids: Tensor
    logps: Tensor
    divergence: Divergence

    def compare(self, rows: slice, logps: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Target`."""
        ids = self.ids[rows]
        top = logps.gather(1, ids)
        tail = logps.scatter_(1, ids, float("-inf"))
        others = tail.logsumexp(-1, keepdim=True)
        buckets = torch.log_softmax(torch.cat([top, others], -1), -1)
        values, slopes = self.divergence(buckets, buckets.exp(), self.logps[rows].to(buckets.dtype, copy=True))
        gradient = tail.sub_(others).exp_().mul_(slopes[:, -1:])
        return values, gradient.scatter_(1, ids, slopes[:, :-1])


@dataclass(frozen=True)
class Measured:
    """loss: scalar with gradient, the sum over positions times `scale`. values, entropies: (N,) nats, without."""

    loss: Tensor
    values: Tensor
    entropies: Tensor


def divergence_loss(hidden: Tensor, head: Head, target: Target, scale: float = 1.0) -> Measured:
    """Divergence of a student with last hidden states (N, d) from `target`, over N response positions.

    Gradients flow to `hidden` and to `head.weight` if these require them. `entropies` are the student's.
    """
    return Measured(*_ChunkedDivergence.apply(hidden, head.weight, head, target, scale))  # type: ignore[no-untyped-call]  # torch


class _ChunkedDivergence(torch.autograd.Function):
    """Chunks of positions: project, compare, take the gradient, drop the logits."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        target: Target,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = states_of_head(hidden.detach())
        head = Head(weight.detach().to(states.dtype), head.cap, head.temperature)
        wide = states.dtype if states.dtype == torch.float64 else torch.float32
        of_hidden = states.new_empty(hidden.shape, dtype=wide) if ctx.needs_input_grad[0] else None
        of_weight = states.new_zeros(weight.shape, dtype=wide) if ctx.needs_input_grad[1] else None
        values, entropies = states.new_empty(2, len(hidden), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), len(weight)):
                logits = head.logits(states[rows])
                logps = torch.log_softmax(logits, -1)
                probs = logps.exp()
                entropies[rows] = -_dot(probs, logps)
                values[rows], gradient = target.compare(rows, logps, probs)
                if of_hidden is not None or of_weight is not None:
                    gradient = head.slope_(gradient, logits).mul_(scale).to(states.dtype)
                    _accumulate(of_hidden, of_weight, rows, gradient, states, head.weight)
                del logits, logps, probs, gradient  # before the next chunk is made
        ctx.gradients = of_hidden, of_weight
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(values, entropies)
        return values.sum() * scale, values, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        # Almost always 1: then the (V, d) gradient of the head is handed on without a copy.
        factor = gradient.item()
        found = (
            None if part is None else (part if factor == 1 else part * factor).to(dtype)
            for part, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return (*found, None, None, None)


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK // vocabulary)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T, (K, V), in fp32 or better; a weight of another dtype is converted a slab at a time."""
    hidden = states_of_head(hidden)
    if weight.dtype == hidden.dtype:
        return wide_product(hidden, weight.t())
    return torch.cat([wide_product(hidden, slab.to(hidden.dtype).t()) for slab in weight.split(SLAB)], -1)


def _accumulate(
    of_hidden: Tensor | None, of_weight: Tensor | None, rows: slice, gradient: Tensor, states: Tensor, weight: Tensor
) -> None:
    """Carry d/d(hidden @ weight.T) of a chunk (K, V) on to the hidden states and the head."""
    if of_hidden is not None:
        of_hidden[rows] = wide_product(gradient, weight)
    if of_weight is None:
        return
    if gradient.dtype == of_weight.dtype:
        of_weight.addmm_(gradient.t(), states[rows])
    else:  # a product of half precision would be rounded before it is added
        for part, slab in zip(of_weight.split(SLAB), gradient.split(SLAB, -1), strict=True):
            part.add_(wide_product(slab.t(), states[rows]))
