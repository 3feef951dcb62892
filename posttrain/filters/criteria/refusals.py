"""A cap on the share of refusals among the rows that are kept, instead of dropping them all."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["surplus_refusals"]


def surplus_refusals(
    refuses: NDArray[np.bool_], protected: NDArray[np.bool_], share: float, seed: int
) -> NDArray[np.intp]:
    """Indices of the refusals that must go for refusals to be at most `share` of what stays.

    With A answers and R refusals r may stay: r / (A + r) <= share, so r = floor(share A / (1 - share)). Those that go
    are drawn with `seed`; `protected` ones stay, and count.
    """
    answers = int(np.count_nonzero(~refuses))
    allowed = math.floor(share * answers / (1 - share) + 1e-9)
    droppable = np.flatnonzero(refuses & ~protected)
    surplus = min(len(droppable), max(int(np.count_nonzero(refuses)) - allowed, 0))
    drawn = np.random.default_rng(seed).permutation(droppable)[:surplus]
    return np.sort(drawn)
