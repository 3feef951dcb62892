"""Attention masks and the KV cache of sampler and scorer: built once per batch, then sliced or written in place.

transformers rebuilds both masks in every forward pass and concatenates the whole cache for every token. For small
models the masks cost more than the network, for large ones the cache copies gigabytes. The allowed keys are the same:

    global layer: key column <= query column;   local layer: also key column > query column - window
    (Gemma 2 report, 2408.00118, section 2: local and global layers alternate)

The masks are additive: 0 where attention is allowed, the lowest finite number elsewhere, so that a padded query without
any key stays finite. Only eager and sdpa attention accept them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from gemma2.core.errors import InputError

from .protocols import ModelConfig, Network

__all__ = [
    "Masks",
    "additive",
    "causal_masks",
    "check_attention",
    "empty_cache",
    "layer_masks",
    "layer_windows",
    "padded_masks",
    "taking_masks",
]

Masks = Tensor | dict[str, Tensor]

GROWTH = 64  # token columns added when the cache is full


def check_attention(model: Network) -> None:
    """Raise InputError for an attention back end that does not accept additive masks."""
    name = getattr(model.config, "_attn_implementation", "eager")
    if name not in ("eager", "sdpa"):
        raise InputError(f"'{name}' attention does not accept prebuilt masks", "load the model with eager attention")


@contextmanager
def taking_masks(model: Network) -> Iterator[None]:
    """Switch to eager attention while the context is open if the model's own does not accept additive masks."""
    name = getattr(model.config, "_attn_implementation", "eager")
    if name in ("eager", "sdpa"):
        yield
        return
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = name


def layer_windows(config: ModelConfig) -> list[int | None]:
    """Return the window of each layer in tokens, None for a global layer."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `allowed`, the lowest finite value of `dtype` elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def layer_masks(config: ModelConfig, mask: Tensor) -> Masks:
    """Return the `attention_mask` that a model expects, from the mask (B, 1, Q, K) of a global layer.

    A mapping by layer kind if the model mixes local and global layers, else one tensor.
    """
    windows = set(layer_windows(config))
    if windows == {None}:
        return mask
    (window,) = windows - {None}
    assert window is not None
    if getattr(config, "layer_types", None) is None:
        return windowed(mask, window)
    return {"full_attention": mask, "sliding_attention": windowed(mask, window)}


def windowed(mask: Tensor, window: int) -> Tensor:
    """Return the mask of a local layer: a query sees its own column and the window - 1 before it.

    One query: the last `window` columns, the same that `KvLayer` returns. Several, which are those of the last columns:
    all columns, the far ones masked.
    """
    queries, columns = mask.shape[-2:]
    if queries == 1:
        return mask[..., -window:]
    if columns <= window:
        return mask
    column = torch.arange(columns, device=mask.device)
    far = column <= column[-queries:, None] - window  # (Q, K), row = query
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)


def causal_masks(model: Network, width: int) -> Masks:
    """Return masks (1, 1, width, width) for rows without left padding; a row cannot see beyond its end."""
    return padded_masks(model, torch.ones(1, width, dtype=torch.bool, device=model.device))


def padded_masks(model: Network, present: Tensor) -> Masks:
    """Return masks (B, 1, T, T) from present (B, T) bool, False on padding of either side."""
    check_attention(model)
    column = torch.arange(present.shape[1], device=present.device)
    past = column <= column[:, None]  # (T, T), row = query
    return layer_masks(model.config, additive(present[:, None, None] & past, model.dtype))


def empty_cache(config: ModelConfig, dtype: torch.dtype | None = None) -> Cache:
    """Return a cache for decoding, one `KvLayer` per layer. dtype: of what is kept; None: as it comes."""
    return Cache(layers=[KvLayer(window, dtype) for window in layer_windows(config)])


class KvLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer, (B, heads, capacity, head_dim), grown in blocks and written in place.

    A local layer keeps all columns and returns the last `window` of them to one query; to several it returns all, of
    which `windowed` masks the far ones.
    """

    def __init__(self, window: int | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.window, self.stored = window, dtype
        self.is_sliding = window is not None
        self.length = 0
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the keys and values of the prefill, without a copy if they have the dtype of the cache.

        Under autocast rotated keys come in fp32 and values in bf16.
        """
        self.keys = key_states if self.stored is None else key_states.to(self.stored)
        self.values = value_states if self.stored is None else value_states.to(self.stored)
        self.length = key_states.shape[2]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, Q, head_dim) and return the keys and values that the queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self.keys, self.values
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = _grown(self.keys, start), _grown(self.values, start)
        self.keys.narrow(2, start, self.length - start).copy_(key_states)
        self.values.narrow(2, start, self.length - start).copy_(value_states)
        first = max(0, self.length - self.window) if self.window is not None and key_states.shape[2] == 1 else 0
        return self.keys.narrow(2, first, self.length - first), self.values.narrow(2, first, self.length - first)

    def keep_columns(self, length: int) -> None:
        """Forget all columns but the first `length`."""
        self.length = min(self.length, length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.keys, self.values = self.keys[indices], self.values[indices]

    def get_seq_length(self) -> int:
        """Return the number of columns written so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the columns that `update` returns."""
        total = self.length + query_length
        offset = max(0, total - self.window) if self.window is not None and self.is_initialized else 0
        return total - offset, offset

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1


def _grown(tensor: Tensor, used: int) -> Tensor:
    """Return a copy with room for more columns; the first `used` are kept."""
    batch, heads, capacity, dim = tensor.shape
    grown = tensor.new_empty(batch, heads, capacity + max(GROWTH, capacity // 4), dim)
    grown[:, :, :used] = tensor[:, :, :used]
    return grown
