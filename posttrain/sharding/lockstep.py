"""Forward passes in step: a sharded model runs as often on each process, or none of them ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from gemma2.core.ranks import Ranks
from gemma2.posttrain.models.scorer import Pace

from .units import is_sharded

__all__ = ["in_step", "pace_of"]

T = TypeVar("T")


def in_step(parts: Sequence[T], ranks: Ranks) -> Iterator[T | None]:
    """Yield each part, then None until every process has had the same number: a forward pass that nobody needs."""
    most = max(ranks.gather(len(parts)))
    yield from parts
    yield from [None] * (most - len(parts))


def pace_of(model: object, ranks: Ranks) -> Pace:
    """The pace at which `model`, without peft's wrapper, runs batches: that of all processes if it is sharded."""

    def pace(batches: Sequence[list[int]]) -> Iterable[list[int] | None]:
        return in_step(batches, ranks) if is_sharded(model) else batches

    return pace
