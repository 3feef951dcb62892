"""Causal attention for training on a CPU: eager attention in blocks of queries, without the scores that are masked.

    S = c(scale Q K'),   c(z) = cap tanh(z / cap), or z without a soft cap;   P = softmax(S + mask),   O = P V
    dV = P' dO,   dS = P * (dO V' - rowsum(dO V' * P)),   dQ = scale (dS * c'(z)) K,   dK = scale (dS * c'(z))' Q
                                                       (Gemma 2 report, 2408.00118, section 2: soft cap 50, windows)

A block of queries meets the keys up to its own end, in a local layer those of its window: about half of the score
matrix is never formed. The soft cap is applied in place, and the heads that share keys are one product, so that keys
and values are not repeated. Rows are padded on the right, where no query looks, so padding needs no mask. Without
gradients, a block is freed before the next one.

Deviation from transformers' eager attention: only the order of sums. Dropout and attention weights are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from .protocols import Network

__all__ = ["blockwise", "can_be_blockwise", "causal_attention"]

NAME = "gemma2_blockwise"
BLOCK = 64  # queries at once
# Architectures with exactly this attention: no sinks, no position biases, no other scores.
KNOWN = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")


def can_be_blockwise(model: Network) -> bool:
    """Whether a model's eager attention computes the formulas above."""
    config = model.config
    return config.model_type in KNOWN and not getattr(config, "attention_dropout", 0.0)


@contextmanager
def blockwise(model: Network) -> Iterator[None]:
    """Use attention in blocks while the context is open. The backward pass may run after it has closed."""
    AttentionInterface.register(NAME, _attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # noqa: ANN401  # those of every architecture, whatever their types
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query (B, H, T, D), key and value (B, Hk, T, D) -> (B, T, H, D)."""
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    output = causal_attention(query, key, value, scale, options.get("softcap"), options.get("sliding_window"))
    return output.transpose(1, 2), None


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None = None, window: int | None = None
) -> Tensor:
    """Return O (B, H, T, D) of query (B, H, T, D), key and value (B, Hk, T, D); H is a multiple of Hk."""
    batch, heads, tokens, dim = query.shape
    groups = heads // key.shape[1]
    shape = (batch * key.shape[1], tokens, dim)
    grouped = query.reshape(batch * key.shape[1], groups, tokens, dim)
    arguments = (grouped, key.reshape(shape), value.reshape(shape), scale, cap, window)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    # `apply` is not typed.
    output: Tensor = _Attention.apply(*arguments) if learns else _attend(*arguments)  # type: ignore[no-untyped-call]
    return output.view(query.shape)


Kept = list[tuple[Tensor, Tensor | None]]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    cap: float | None,
    window: int | None,
    kept: Kept | None = None,
) -> Tensor:
    """Return O (N, G, T, D) of query (N, G, T, D), key and value (N, T, D).

    N: key heads of all rows; G: query heads that share one. Each block's weights and bounded scores, which the backward
    pass needs, are appended to `kept`.
    """
    output = torch.empty_like(query)
    for rows, columns in _blocks(query.shape[2], window):
        scores = torch.baddbmm(
            query.new_empty(()),
            _rows(query, rows),
            key[:, columns].transpose(1, 2),
            beta=0,
            alpha=scale if cap is None else scale / cap,
        )
        mask = _mask(rows, columns, window, query)
        square = scores.view(len(query), -1, rows.stop - rows.start, scores.shape[-1])
        bounded = scores.tanh_() if cap is not None else None
        if cap is None:
            masked = square.add_(mask)
        else:  # in place if the backward pass will not need the bounded scores
            masked = torch.add(mask, square, alpha=cap, out=square if kept is None else None)
        weights = torch.softmax(masked.view(scores.shape), -1)
        output[:, :, rows] = torch.bmm(weights, value[:, columns]).view(output[:, :, rows].shape)
        if kept is not None:
            kept.append((weights, bounded))
    return output


class _AttentionContext(Protocol):
    """The values that the forward pass keeps for the backward pass, in addition to autograd's own members."""

    saved_tensors: tuple[Tensor, ...]
    kept: Kept
    scale: float
    window: int | None

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Attention(torch.autograd.Function):
    """`_attend` with its backward pass."""

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        cap: float | None,
        window: int | None,
    ) -> Tensor:
        kept: Kept = []
        output = _attend(query, key, value, scale, cap, window, kept)
        ctx.save_for_backward(query, key, value)
        ctx.kept, ctx.scale, ctx.window = kept, scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttentionContext, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (rows, columns), (weights, bounded) in zip(_blocks(query.shape[2], ctx.window), ctx.kept, strict=True):
            out = _rows(upstream, rows)
            to_value[:, columns] += torch.bmm(weights.transpose(1, 2), out)
            gradient = torch.bmm(out, value[:, columns].transpose(1, 2))
            gradient = torch._softmax_backward_data(gradient, weights, -1, weights.dtype)
            if bounded is not None:
                gradient.addcmul_(gradient, bounded.square_(), value=-1)
            part = torch.bmm(gradient, key[:, columns]).mul_(ctx.scale)
            to_query[:, :, rows] = part.view(to_query[:, :, rows].shape)
            to_key[:, columns] += torch.bmm(gradient.transpose(1, 2), _rows(query, rows)).mul_(ctx.scale)
        del ctx.kept
        return to_query, to_key, to_value, None, None, None


def _blocks(tokens: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield (queries, the keys that at least one of them sees)."""
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """Return the queries `rows` as (N, G * rows, D) from (N, G, T, D)."""
    return tensor[:, :, rows].reshape(len(tensor), -1, tensor.shape[-1])


def _mask(rows: slice, columns: slice, window: int | None, like: Tensor) -> Tensor:
    """Return 0 where a query sees a key, else minus infinity; every query sees itself."""
    query = torch.arange(rows.start, rows.stop, device=like.device)[:, None]
    key = torch.arange(columns.start, columns.stop, device=like.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
