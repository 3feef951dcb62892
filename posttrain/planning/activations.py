"""Memory of forward and backward passes: activations, attention scores, logits, KV cache. Bytes; pure.

One block of Gemma 2 keeps for its backward pass, in elements per token (h: width, i: inner width of the MLP, H and G:
query and key heads, D: head size; fp32 on a CPU, counted with torch's saved-tensor hooks):

    norms and residuals   10 h     in and out of four norms, the inputs of attention and MLP; 6 h if norms are frozen
    MLP                    4 i     gate, its activation, up, their product
    attention              2 (H + G) D                   blockwise: queries, keys, values, output
                           4 H D                         eager: keys and values repeated for every query head
    scores                 2 H x the columns that a query meets   weights, and scores bounded by the soft cap

Blockwise attention (`models/causal_attention.py`) meets the columns up to the end of its block of 64 queries, in a
local layer those of the window; eager attention meets all columns of the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .shapes import ModelShape

__all__ = ["Attention", "Network", "Rows", "cpu_parts", "decode_bytes", "sampler_logits"]

Attention = Literal["blockwise", "eager", "flash"]

BLOCK = 64  # queries of one block, as in causal_attention.py
GROWTH = 64  # columns by which the sampler's cache grows, as in attention.py
NORMS = 6  # per token: the roots of four norms, and the sums of the last one

# Bytes per element under bf16 autocast, counted by hand from the operations, not measured: a linear layer's input is
# cast for each of its products, norms and residuals are fp32.
MIXED_NORMS, MIXED_MLP, MIXED_HEADS, MIXED_SCORES = 42, 8, 10, 16


@dataclass(frozen=True)
class Rows:
    """A batch: rows, and tokens of each, padding included."""

    rows: int
    tokens: int

    @property
    def count(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Network:
    """A model in use: its shape, how it attends and in which precision.

    attention      blockwise: this project's, on a CPU; eager: all scores at once; flash: no scores in memory
    mixed          whether it runs under bf16 autocast, on an accelerator
    checkpointing  whether the backward pass computes each block again, from its input
    trained        whether all weights are trained, as opposed to adapters or none
    rank, adapted  rank of the adapters, and how many linear layers of a block have one
    """

    shape: ModelShape
    attention: Attention
    mixed: bool = False
    checkpointing: bool = False
    trained: bool = True
    rank: int = 0
    adapted: int = 0

    def columns(self, tokens: int, local: bool) -> float:
        """Scores per query head of one row: queries times the columns that they meet."""
        if self.attention == "flash":
            return 0.0
        window = self.shape.window if local else None
        return float(tokens * tokens) if self.attention == "eager" else _block_columns(tokens, window)

    def scores(self, batch: Rows, local: bool) -> float:
        """Elements of one copy of the scores of one layer."""
        return batch.rows * self.shape.heads * self.columns(batch.tokens, local)

    def block_bytes(self, batch: Rows, local: bool) -> float:
        """Bytes that one block keeps for its backward pass."""
        shape = self.shape
        heads, groups = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        around = 4 * heads if self.attention == "eager" else 2 * (heads + groups)
        if self.mixed:
            of_token = MIXED_NORMS * shape.hidden + MIXED_MLP * shape.inner + MIXED_HEADS * heads
            return batch.count * float(of_token) + MIXED_SCORES * self.scores(batch, local)
        norms = 10 if self.trained else 6
        of_token = norms * shape.hidden + 4 * shape.inner + around + NORMS + self.adapted * self.rank
        kept = 2 if shape.capped else 1
        return 4.0 * (batch.count * of_token + kept * self.scores(batch, local))

    def saved_bytes(self, batch: Rows) -> float:
        """Bytes that all blocks keep until the backward pass begins."""
        shape, edge = self.shape, 4.0 * batch.count * self.shape.hidden
        if self.checkpointing:
            return edge * (shape.layers + 2)
        local, everywhere = self.block_bytes(batch, True), self.block_bytes(batch, False)
        return shape.local_layers * local + (shape.layers - shape.local_layers) * everywhere + 3 * edge

    def working_bytes(self, batch: Rows) -> float:
        """Bytes that the backward pass of one block works with, in addition to what the block has kept."""
        shape = self.shape
        item = 2.0 if self.mixed else 4.0
        scores = 0.0 if self.attention == "blockwise" else item * 2 * self.scores(batch, False)
        again = self.block_bytes(batch, False) if self.checkpointing else 0.0
        return again + item * batch.count * (2 * shape.hidden + 2 * shape.inner) + scores

    def forward_bytes(self, batch: Rows) -> float:
        """Bytes of a forward pass without gradients: the widest moment of one block, and the masks."""
        shape = self.shape
        item = 2.0 if self.mixed else 4.0
        heads = shape.heads * shape.head_dim
        mlp = batch.count * (3 * shape.inner + 3 * shape.hidden)
        scores = 3 * self.scores(batch, False) if self.attention == "eager" else 0.0
        attention = batch.count * (3 * shape.hidden + 4 * heads) + scores
        if self.attention == "blockwise":
            attention += 2 * batch.rows * shape.heads * min(BLOCK, batch.tokens) * batch.tokens
        return item * max(mlp, attention) + self.mask_bytes(batch)

    def mask_bytes(self, batch: Rows) -> float:
        """Bytes of the masks of eager attention: one of global and one of local layers."""
        if self.attention != "eager":
            return 0.0
        kinds = 2 if 0 < self.shape.local_layers < self.shape.layers else 1
        return 4.0 * kinds * batch.tokens * batch.tokens


def _block_columns(tokens: int, window: int | None) -> float:
    """Queries times columns over all blocks of one row."""
    return float(sum((end - start) * (end - first) for start, end, first in _blocks(tokens, window)))


def _blocks(tokens: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    for start in range(0, tokens, BLOCK):
        yield start, min(start + BLOCK, tokens), 0 if window is None else max(0, start - window + 1)


def cpu_parts(batch: Rows, tokens: int) -> Rows:
    """Return the largest part that a CPU trainer cuts a micro-batch into: at most `tokens` tokens, or one row."""
    return Rows(max(1, min(batch.rows, tokens // max(1, batch.tokens))), batch.tokens)


def decode_bytes(network: Network, rows: int, prompt: int, new: int, item: int) -> float:
    """Bytes of the sampler's cache at its largest: all columns of every row, and the layer that is being copied."""
    shape, columns = network.shape, prompt
    while columns < prompt + new:
        columns += max(GROWTH, columns // 4)
    of_rows = rows * shape.cache_bytes(columns, item)
    return of_rows * (1 + 1 / max(1, shape.layers))


def sampler_logits(shape: ModelShape, rows: int, whole: bool) -> float:
    """Bytes of the logits of one step: fp32, before and after the soft cap.

    whole  whether the distribution is left whole: otherwise every row is sorted or cut in fp64
    """
    tile = min(float(rows), math.ceil(2**22 / max(1, shape.vocabulary))) * shape.vocabulary * 4
    drawing = tile if whole else rows * shape.vocabulary * 24.0
    return rows * shape.vocabulary * 8.0 + drawing
