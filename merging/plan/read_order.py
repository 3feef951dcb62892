"""The order in which a merge reads its inputs, as ranges of their files: what is fetched first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.outputs.safetensors_header import ITEM_BYTES, Tensor
from gemma2.merging.remote.arrivals import Span

from .groups import Source
from .merge_plan import MergePlan

__all__ = ["read_order"]

PIECE = 1 << 22  # elements of each operand in turn: all operands of a block are needed for its merge
SMALL = 1 << 16  # bytes between two wanted ranges that are fetched with them, for one request less


@dataclass
class _Range:
    file: Path
    first: int
    end: int


def read_order(plan: MergePlan) -> list[Span]:
    """Return ranges of the weight files: copies to be checked, then group after group, then what is carried over."""
    found: list[_Range] = []
    latest: dict[Path, _Range] = {}  # the last range of each file
    for tensor, first, count in _reads(plan):
        item = ITEM_BYTES[tensor.dtype]
        begin, end = tensor.offset + first * item, tensor.offset + (first + count) * item
        last = latest.get(tensor.file)
        if last and last.first <= begin <= last.end + SMALL and end - last.first <= PIECE * 2:
            last.end = max(end, last.end)
        else:
            latest[tensor.file] = _Range(tensor.file, begin, end)
            found.append(latest[tensor.file])
    return [(one.file, one.first, one.end) for one in found]


def _reads(plan: MergePlan) -> Iterator[tuple[Tensor, int, int]]:
    for model in plan.inputs:
        for pair in model.copies:
            yield from ((tensor, 0, tensor.count) for tensor in pair)
    for group in plan.groups:
        for name in group.tensors:
            yield from _of_part(plan.parts[name].sources)
    for name in plan.carried:
        tensor = plan.models[0].tensors[name]
        yield tensor, 0, tensor.count


def _of_part(sources: tuple[Source, ...]) -> Iterator[tuple[Tensor, int, int]]:
    for source in sources:
        if source.update:
            yield from ((factor, 0, factor.count) for factor in (source.update.a, source.update.b))
    others = [Source(model, source.name) for source in sources if source.rows for model in source.rows.inputs]
    tensors = list(dict.fromkeys(source.tensor for source in (*sources, *others)))
    for first in range(0, max(tensor.count for tensor in tensors), PIECE):
        for tensor in tensors:
            if first < tensor.count:
                yield tensor, first, min(PIECE, tensor.count - first)
