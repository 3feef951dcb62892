"""Forward passes in step: a sharded model runs as often on each process, or none of them ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from gemma2.core.ranks import Ranks

__all__ = ["in_step"]

T = TypeVar("T")


def in_step(parts: Sequence[T], ranks: Ranks) -> Iterator[tuple[T, bool]]:
    """Yield each part with True, then a part again, with False, until every process has had the same number.

    Raises RuntimeError for a process without any part: it has nothing to run a forward pass with.
    """
    most = max(ranks.gather(len(parts)))
    if most and not parts:
        raise RuntimeError("a process has no rows to score while others do")
    for i in range(most):
        yield (parts[i], True) if i < len(parts) else (parts[0], False)
