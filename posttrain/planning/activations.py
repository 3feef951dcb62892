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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .parts import Bytes, blocks
from .shapes import ModelShape

__all__ = ["Attention", "NetworkInUse", "RowBatch", "cpu_parts", "decode_bytes", "sampler_logits"]

Attention = Literal["blockwise", "eager", "flash"]

BLOCK = 64  # queries of one block, as in causal_attention.py
GROWTH = 64  # columns by which the sampler's cache grows, as in attention.py
NORMS = 6  # per token: the roots of four norms, and the sums of the last one

# Bytes per element under bf16 autocast, counted by hand from the operations, not measured: a linear layer's input is
# cast for each of its products, norms and residuals are fp32.
MIXED_NORMS, MIXED_MLP, MIXED_HEADS, MIXED_SCORES = 42, 8, 10, 16


@dataclass(frozen=True)
class RowBatch:
    """A batch: rows, and tokens of each, padding included. A part may have a share of a row, where rows differ."""

    rows: float
    tokens: int

    @property
    def count(self) -> float:
        """Tokens of all rows."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class NetworkInUse:
    """A model in use: its shape, how it attends and in which precision.

    attention      blockwise: this project's, on a CPU; eager: all scores at once; flash: no scores in memory
    mixed          whether it runs under bf16 autocast, on an accelerator
    checkpointing  whether the backward pass computes each block again, from its input
    trained        whether all weights are trained, as opposed to adapters or none
    last_only      whether the last block runs at the last token of each row only, as for a reward (states.py)
    rank, adapted  rank of the adapters, and how many linear layers of a block have one
    """

    shape: ModelShape
    attention: Attention
    mixed: bool = False
    checkpointing: bool = False
    trained: bool = True
    last_only: bool = False
    rank: int = 0
    adapted: int = 0

    def columns(self, tokens: int, local: bool) -> float:
        """Scores per query head of one row: queries times the columns that they meet."""
        if self.attention == "flash":
            return 0.0
        window = self.shape.window if local else None
        return float(tokens * tokens) if self.attention == "eager" else _block_columns(tokens, window)

    def scores(self, batch: RowBatch, local: bool) -> float:
        """Elements of one copy of the scores of one layer."""
        return batch.rows * self.shape.heads * self.columns(batch.tokens, local)

    def block_bytes(self, batch: RowBatch, local: bool) -> Bytes:
        """Memory that one block keeps for its backward pass."""
        shape = self.shape
        queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        if self.mixed:
            of_token = MIXED_NORMS * shape.hidden + MIXED_MLP * shape.inner + MIXED_HEADS * queries
            return Bytes(batch.count * float(of_token) + MIXED_SCORES * self.scores(batch, local))
        token = 4.0 * batch.count
        found = blocks(token * shape.hidden, 10 if self.trained else 6) + blocks(token * shape.inner, 4)
        if self.attention == "eager":
            found += blocks(token * queries, 4)
        else:
            found += blocks(token * queries, 2) + blocks(token * keys, 2)
        found += blocks(token, NORMS) + blocks(token * self.rank, self.adapted)
        return found + self.score_blocks(batch, local) * (2 if shape.capped else 1)

    def score_blocks(self, batch: RowBatch, local: bool) -> Bytes:
        """Memory of one copy of the scores of one layer, in the blocks that attention makes."""
        heads, tokens = 4.0 * batch.rows * self.shape.heads, batch.tokens
        if self.attention != "blockwise":
            return blocks(heads * self.columns(tokens, local))
        window = self.shape.window if local else None
        sizes = (heads * (end - start) * (end - first) for start, end, first in _blocks(tokens, window))
        return sum((blocks(size) for size in sizes), Bytes())

    def saved_bytes(self, batch: RowBatch) -> Bytes:
        """Memory that all blocks keep until the backward pass begins."""
        shape, edge = self.shape, 4.0 * batch.count * self.shape.hidden
        if self.checkpointing:
            return blocks(edge, shape.layers + 2)
        local, everywhere = self.block_bytes(batch, True), self.block_bytes(batch, False)
        found = local * shape.local_layers + everywhere * (shape.layers - shape.local_layers) + blocks(edge, 3)
        if not self.last_only or shape.layers < 2:
            return found
        last = everywhere if shape.layers > shape.local_layers else local
        keys = blocks(4.0 * batch.count * shape.groups * shape.head_dim, 3)
        return found + last * -1.0 + blocks(edge, 3) + keys

    def working_bytes(self, batch: RowBatch) -> Bytes:
        """Memory that the backward pass of one block works with, in addition to what the block has kept."""
        shape = self.shape
        item = 2.0 if self.mixed else 4.0
        wide = 5 if self.rank else 3  # an adapter adds its own path to every product and its gradient
        found = blocks(item * batch.count * shape.hidden, 3) + blocks(item * batch.count * shape.inner, wide)
        if self.attention == "eager":
            found += blocks(item * self.scores(batch, False), 2)
        return found + (self.block_bytes(batch, False) if self.checkpointing else Bytes())

    def forward_bytes(self, batch: RowBatch) -> Bytes:
        """Memory of a forward pass without gradients: the widest moment of one block, and the masks."""
        shape = self.shape
        item = 2.0 if self.mixed else 4.0
        width, heads = item * batch.count, shape.heads * shape.head_dim
        mlp = blocks(width * shape.inner, 3) + blocks(width * shape.hidden, 3)
        attention = blocks(width * shape.hidden, 3) + blocks(width * heads, 4)
        if self.attention == "eager":
            attention += blocks(item * self.scores(batch, False), 3)
        elif self.attention == "blockwise":
            attention += blocks(item * batch.rows * shape.heads * min(BLOCK, batch.tokens) * batch.tokens, 2)
        return max(mlp, attention, key=lambda moment: moment.total) + self.mask_bytes(batch)

    def mask_bytes(self, batch: RowBatch) -> Bytes:
        """Memory of the masks of eager attention: one of global and one of local layers."""
        if self.attention != "eager":
            return Bytes()
        kinds = 2 if 0 < self.shape.local_layers < self.shape.layers else 1
        return blocks(4.0 * batch.tokens * batch.tokens, kinds)


def _block_columns(tokens: int, window: int | None) -> float:
    """Queries times columns over all blocks of one row."""
    return float(sum((end - start) * (end - first) for start, end, first in _blocks(tokens, window)))


def _blocks(tokens: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    for start in range(0, tokens, BLOCK):
        yield start, min(start + BLOCK, tokens), 0 if window is None else max(0, start - window + 1)


def cpu_parts(batch: RowBatch, tokens: int) -> RowBatch:
    """Return the largest part that a CPU trainer cuts a micro-batch into: at most `tokens` tokens, or one row.

    RowBatch that are shorter than the longest fill a part up to the limit.
    """
    return RowBatch(max(1, min(batch.rows, tokens / max(1, batch.tokens))), batch.tokens)


def decode_bytes(shape: ModelShape, rows: int, prompt: int, new: int, item: int) -> Bytes:
    """Memory of the sampler's cache at its largest: all columns of every row, and the layer that is being copied."""
    columns = prompt
    while columns < prompt + new:
        columns += max(GROWTH, columns // 4)
    of_tensor = rows * shape.groups * shape.head_dim * float(item) * columns
    return blocks(of_tensor, 2 * shape.layers + 1)


def sampler_logits(shape: ModelShape, rows: int, whole: bool) -> Bytes:
    """Memory of the logits of one step: fp32, before and after the soft cap.

    whole  whether the distribution is left whole: otherwise every row is sorted or cut in fp64
    """
    row = shape.vocabulary * 4.0
    tile = min(rows, max(1, 2**22 // max(1, shape.vocabulary)))
    return blocks(rows * row, 2) + (blocks(tile * row) if whole else blocks(2 * rows * row, 3))
