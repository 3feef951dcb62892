"""Streams methods by elements (`methods.method.Elements`): pieces of whole rows through functions on numpy arrays.

Pieces depend on the shapes alone, and what the functions return is added up in the order of the file: the result is bit
for bit the same for any number of threads, size of cut and division into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import fsum, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2.core.outputs.safetensors_header import ITEM_BYTES
from gemma2.core.progress import Task
from gemma2.merging.kernels.dtypes import narrow
from gemma2.merging.kernels.number_formats import KINDS
from gemma2.merging.methods.method import Elements, Group, Piece
from gemma2.merging.plan.merge_plan import MergePlan

from .dense_stream import Output
from .feeder import PIECE, Block, Feeder, in_order, row_length, whole_rows
from .group_report import GroupReport, gram_of, report_group

__all__ = ["ElementStream"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Written:
    """The sums of one piece: squared norm of the base, inner products of the vectors, squared norm of the result."""

    count: int
    base: float
    products: tuple[float, ...]
    result: float


class ElementStream:
    """As many passes over each group as the method asks for, and one that writes."""

    def __init__(self, plan: MergePlan, feeder: Feeder, output: Output, task: Task, elements: Elements) -> None:
        self.plan = plan
        self.feeder = feeder
        self.output = output
        self.task = task
        self.elements = elements

    def run(self) -> Iterator[GroupReport]:
        """Merge group after group."""
        with self.plan.arrivals.pool(self.plan.request.threads) as pool:
            for group in self.plan.groups:
                made = []

                def total(function: Callable[[Piece], Array]) -> Array:
                    made.append(function)  # noqa: B023
                    return self._total(pool, group, function)  # noqa: B023

                found = self.elements.look(group, total)
                size = sum(self.feeder.job_bytes(job) for job in self._jobs(group))
                self.task.advance(size * (self.elements.looks - len(made)))
                written = list(in_order(pool, lambda job: self._write(group, job, found), self._jobs(group)))  # noqa: B023
                yield self._report(group, written)

    def _jobs(self, group: Group) -> Iterator[Block]:
        for name in group.tensors:
            part = self.plan.parts[name]
            count, step = part.sources[0].count, whole_rows(row_length(self.plan.layout[name][1]), PIECE)
            for first in range(0, count, step):
                yield Block(name, part, first, min(step, count - first))

    def _piece(self, group: Group, job: Block) -> Piece:
        values = self.feeder.values(job).astype(np.float64)
        shape = self.plan.layout[job.name][1]
        return Piece(values, row_length(shape), group.based, len(shape) < 2)

    def _total(self, pool: ThreadPoolExecutor, group: Group, function: Callable[[Piece], Array]) -> Array:
        """Add up what a function returns for each piece, in the order of the file."""
        sums: Array | None = None
        for job, found in in_order(pool, lambda job: (job, function(self._piece(group, job))), self._jobs(group)):
            sums = found if sums is None else sums + found
            self.task.advance(self.feeder.job_bytes(job))
        return np.zeros(0) if sums is None else sums

    def _write(self, group: Group, job: Block, found: object) -> Written:
        piece = self._piece(group, job)
        merged = self.elements.combine(group, piece, found)
        result = merged
        if group.based:  # the base itself where nothing changes, since -0.0 + 0.0 loses the sign
            result = np.where(merged == 0, piece.values[0], piece.values[0] + merged)
        dtype = self.plan.layout[job.name][0]
        with self.feeder.space() as space:
            if not narrow(result.astype(np.float32), KINDS[dtype], space.out[0, : job.count * ITEM_BYTES[dtype]]):
                raise self.output.overflow(job.name)
            self.output.write(job.name, job.first, job.count, space)
        self.task.advance(self.feeder.job_bytes(job))
        vectors = piece.vectors
        products = tuple(
            float((vectors[i] * vectors[j]).sum()) for i in range(len(vectors)) for j in range(i, len(vectors))
        )
        base = float((piece.values[0] ** 2).sum()) if group.based else 0.0
        return Written(job.count, base, products, float((merged**2).sum()))

    def _report(self, group: Group, written: list[Written]) -> GroupReport:
        columns = zip(*(item.products for item in written), strict=True)
        matrix = gram_of([fsum(column) for column in columns], group.models)
        base = fsum(item.base for item in written) if group.based else None
        row = report_group(
            group.name, sum(item.count for item in written), base, matrix, self.plan.method.mix(group, matrix)
        )
        return replace(row, result_norms=(sqrt(fsum(item.result for item in written)),))
