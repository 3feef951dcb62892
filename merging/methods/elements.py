"""Methods that compute each element of the result from the elements of the models, as functions on numpy arrays.

For methods that are neither one combination per group (`Method.mix`) nor a choice by magnitude or at random
(`Method.selection`). The functions see pieces of whole rows in fp64; they read no file and keep no state. Numpy-free
until they run, since help pages read the table of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .method import Group

    Array = NDArray[Any]
    Doubles = NDArray[np.float64]

__all__ = ["Elements", "Piece", "Total", "nothing", "of_ranks"]

BITS = 16  # a pattern of 31 bits is counted by its upper and then by its lower bits


@dataclass(frozen=True)
class Piece:
    """Whole rows of one tensor in all operands.

    values   (operands, n) fp64, the base first where there is one
    columns  elements of a row; a vector is one row
    based    whether the first operand is the base
    flat     whether the tensor is a vector
    """

    values: Doubles
    columns: int
    based: bool
    flat: bool = False

    @cached_property
    def vectors(self) -> Doubles:
        """(models, n): task vectors where there is a base, else the weights."""
        return self.values[1:] - self.values[0] if self.based else self.values

    def rows(self, values: Doubles) -> Doubles:
        """An array (..., n) as (..., rows, columns)."""
        return values.reshape(*values.shape[:-1], -1, self.columns)


Total = Callable[[Callable[[Piece], "Array"]], "Array"]  # the sum of a function over all pieces of a group


@dataclass(frozen=True)
class Elements:
    """A method by elements.

    combine  (group, piece, what `look` found) -> the merged vector, (n,): added to the base where there is one
    look     (group, total) -> whatever `combine` needs from the whole group; `total(function)` reads all pieces once
             and adds up what the function returns for each, in the order of the file
    looks    how often `look` calls `total`, at most
    """

    combine: Callable[[Group, Piece, Any], Doubles]
    look: Callable[[Group, Total], Any]
    looks: int = 0


def nothing(group: Group, total: Total) -> None:
    """`look` of a method that needs nothing from the whole group."""


def of_ranks(score: Callable[[Piece], Doubles], ranks: Callable[[int], Sequence[int]], total: Total) -> list[float]:
    """The scores with these ranks among all of a group; rank 0 is the smallest, and a rank
    that no element has is infinite. Exact for fp32 scores of 0 or more.

    ranks  (number of elements) -> wanted ranks. Two totals: fp32 numbers order like their bits, which are counted by
           their upper half, then within the halves that hold the ranks.
    """
    import numpy as np

    def bits(piece: Piece) -> Array:
        return score(piece).astype(np.float32).view(np.uint32)

    upper = total(lambda piece: np.bincount(bits(piece) >> BITS, minlength=1 << BITS))
    ends = np.cumsum(upper)
    wanted = ranks(int(ends[-1]))
    if not ends[-1]:
        return [np.inf for _ in wanted]
    bins = [int(np.searchsorted(ends, rank, side="right")) for rank in wanted]  # 1 << BITS if none
    low = (1 << BITS) - 1

    def inside(piece: Piece) -> Array:
        own = bits(piece)
        return np.stack([np.bincount(own[own >> BITS == bin] & low, minlength=1 << BITS) for bin in bins])

    lower = np.cumsum(total(inside), axis=1)
    found = []
    for rank, bin, counts in zip(wanted, bins, lower, strict=True):
        if bin == 1 << BITS:
            found.append(np.inf)
            continue
        before = int(ends[bin] - upper[bin])
        pattern = bin << BITS | int(np.searchsorted(counts, rank - before, side="right"))
        found.append(float(np.array([pattern], np.uint32).view(np.float32)[0]))
    return found
