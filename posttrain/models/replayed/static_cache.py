"""Keys and values of one layer in tensors that keep their places while a captured step runs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["StaticKv"]


class StaticKv:
    """Keys and values, (B, heads, capacity, head_dim), written at the column that a tensor holds.

    window: of a local layer, in tokens; None: global. column: (1,) int64, shared by all layers, where the next token is
    written. `shown`: the first column that queries get, fixed until `reserve` is called again.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None, column: Tensor) -> None:
        self.keys, self.values = keys, values
        self.window, self.column = window, column
        self.shown = 0

    def reserve(self, first: int, end: int) -> None:
        """Make room for columns `first` to `end` - 1, the next ones to be written; new columns are 0.

        Not uninitialised memory: a masked column has the weight 0, and 0 times NaN is NaN.
        """
        self.keys, self.values = _widened(self.keys, end), _widened(self.values, end)
        self.shown = 0 if self.window is None else max(0, first + 1 - self.window)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, head_dim) at the column and return all columns that a query of this stretch may see."""
        self.keys.index_copy_(2, self.column, key.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value.to(self.values.dtype))
        return self.keys[:, :, self.shown :], self.values[:, :, self.shown :]

    def keep(self, rows: Tensor) -> None:
        """Drop every row that is not in `rows` (B',)."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def _widened(tensor: Tensor, end: int) -> Tensor:
    """Return `end` columns: those that there are, then zeros."""
    rows, heads, columns, dim = tensor.shape
    if columns >= end:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(rows, heads, end - columns, dim)), 2)
