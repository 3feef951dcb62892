"""Which rows an epoch holds, where several data sets are mixed by weight. Torch enters for permutations alone.

    quota_i = N w_i / sum_j w_j,  rounded by largest remainder;      N = sum_i n_i training rows, so that an epoch is as
                                                                     long as without weights
    stream_i = permutation_0(rows of i), permutation_1(rows of i), ...
    epoch e takes places e * quota_i ... (e + 1) * quota_i - 1 of stream_i

So no row of a data set comes again before all others of it came: a data set with a small share is spread over the
epochs, one with a large share is repeated evenly. Everything follows from the seed, the number of the data set, and the
epoch. Without weights quota_i = n_i: every row once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemma2.core.errors import UsageError

from .seeds import derived_seed

__all__ = ["Mixture", "apportion"]


@dataclass(frozen=True)
class Mixture:
    """`sizes`: rows of each data set, which follow one another; `quotas`: rows that an epoch takes from each."""

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, sizes: Sequence[int], weights: Sequence[float], seed: int) -> Mixture:
        """Raises UsageError for a weight that gives a data set no row at all."""
        quotas = apportion(weights, sum(sizes)) if weights else list(sizes)
        for place, (size, quota) in enumerate(zip(sizes, quotas, strict=True), start=1):
            if size and not quota:
                raise UsageError(
                    f"--weights: data set {place} gets none of the {sum(sizes)} rows of an epoch", "give it more"
                )
        return cls(tuple(sizes), tuple(quotas), seed)

    def __len__(self) -> int:
        return sum(self.quotas)

    def rows(self, epoch: int) -> list[int]:
        """The rows of an epoch, ascending; a row that comes more than once is there as often."""
        chosen: list[int] = []
        first = 0
        for source, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            chosen += [first + row for row in self._places(source, size, epoch * quota, quota)]
            first += size
        return sorted(chosen)

    def _places(self, source: int, size: int, start: int, count: int) -> list[int]:
        """`count` places of the stream of a data set from `start` on."""
        if size == 0:
            return []
        stream: list[int] = []
        for turn in range(start // size, -(-(start + count) // size)):
            generator = torch.Generator().manual_seed(derived_seed(self.seed, source, turn))
            stream += torch.randperm(size, generator=generator).tolist()
        return stream[start % size : start % size + count]


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """`total` as whole numbers in proportion to `weights`: largest remainders, the first of equal ones."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole
