"""The low-rank update of one weight."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2.core.outputs.safetensors_header import Tensor

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank:
    """The update of one weight: scale * B @ A with a (rank, in), b (out, rank); transposed for a weight (in, out)."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape
