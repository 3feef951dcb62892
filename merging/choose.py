"""Streams merges that choose elements (TIES, DARE, DELLA, Breadcrumbs) through their kernels.

Where magnitudes decide, two counting passes over a group find its exact thresholds; the last pass chooses, combines and
writes. Random masks depend on (seed, tensor, model, index) alone. The result is the same bit for bit for any number of
threads, size of cut and division into shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import fsum, lcm, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .feed import Feeder, Job, Workspace, in_order
from .formats import KINDS, Doubles
from .header import ITEM_BYTES, printable
from .kernels import BLOCK, check_sum, gram, pair_count
from .methods import Group, Selection
from .passes import DONE, load
from .plan import MergePlan
from .progress import Task
from .randomness import stream_key
from .report import GroupReport, gram_of, report_group
from .selection import BUCKETS, bucket_of_rank, histogram, magnitude
from .sparse import Sparsity, sparse_combine
from .stream import Output

__all__ = ["ChoosingStream", "longest_cut"]

MOST_ALIGNED = 1 << 20  # elements; a cut of whole rows that is no multiple of BLOCK below it gives up on BLOCK


def row_length(shape: Sequence[int]) -> int:
    """Of a matrix its columns; a vector is one row."""
    return max(int(shape[-1]), 1) if shape else 1


def longest_cut(plan: MergePlan, cut: int) -> int:
    """The cut that has room for whole rows of every tensor, where ranks within rows are wanted."""
    if plan.method.selection is None or plan.method.selection.by != "rank":
        return cut
    rows = {row_length(shape) for _, shape in plan.layout.values()}
    return max(cut, *(-(-whole_rows(row, cut) // BLOCK) * BLOCK for row in rows))


def whole_rows(row: int, cut: int) -> int:
    """Elements of as many whole rows as fit into a cut, at least one; if possible a multiple of BLOCK."""
    unit = lcm(row, BLOCK)
    if unit > MOST_ALIGNED:
        unit = row
    return max(cut // unit, 1) * unit


@dataclass(frozen=True)
class Found:
    """Of one job: inner products per block, (blocks, 1 + pairs), and squared norms of the merged delta."""

    job: Job
    products: Doubles
    squares: Doubles


class ChoosingStream:
    """One to three passes over each group."""

    def __init__(self, plan: MergePlan, feeder: Feeder, output: Output, task: Task, selection: Selection) -> None:
        self.plan = plan
        self.feeder = feeder
        self.output = output
        self.task = task
        self.selection = selection

    def run(self) -> Iterator[GroupReport]:
        """Merge group after group."""
        with ThreadPoolExecutor(self.plan.request.threads) as pool:
            for group in self.plan.groups:
                sparsity = self._with_thresholds(pool, group, self.selection.of(group))
                table = sparsity.table()
                found = list(
                    in_order(pool, lambda job: self._merge(group, job, sparsity, table), self.feeder.jobs(group))  # noqa: B023
                )
                yield self._report(group, found)

    def _with_thresholds(self, pool: ThreadPoolExecutor, group: Group, sparsity: Sparsity) -> Sparsity:
        """Exact magnitudes between which elements stay, by two counting passes."""
        count = sum(self.plan.parts[name].sources[0].count for name in group.tensors)
        if self.selection.by != "magnitude" or count == 0:
            return sparsity
        limits = self.selection.ranks(group, count)  # (first, last) of each model
        wanted = [(model, rank) for model, pair in enumerate(limits) for rank in pair]
        leading = self._count(pool, group, [(model + 1, -1) for model in range(group.models)])
        places = [bucket_of_rank(leading[model], rank) for model, rank in wanted]
        targets = [(model + 1, bucket) for (model, _), (bucket, _) in zip(wanted, places, strict=True)]
        trailing = self._count(pool, group, targets)
        found = [
            magnitude(bucket, bucket_of_rank(counts, rank)[0])
            for counts, (bucket, rank) in zip(trailing, places, strict=True)
        ]
        high = tuple(value if first > 1 else np.inf for value, (first, _) in zip(found[::2], limits, strict=True))
        return replace(sparsity, low=tuple(found[1::2]), high=high)

    def _count(self, pool: ThreadPoolExecutor, group: Group, targets: list[tuple[int, int]]) -> NDArray[np.int64]:
        """Counts over a group, (targets, BUCKETS)."""
        wanted = np.array(targets, np.int64)
        total = np.zeros((len(targets), BUCKETS), np.int64)
        for job, counts in in_order(pool, lambda job: (job, self._histogram(job, wanted)), self.feeder.jobs(group)):
            total += counts
            self.task.advance(self.feeder.job_bytes(job))
        return total

    def _histogram(self, job: Job, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        counts = np.zeros((len(targets), BUCKETS), np.int64)
        with self.feeder.space() as space:
            for cut in self._cuts(job, self.feeder.size):
                if not histogram(self._load(cut, space), cut.count, targets, counts):
                    raise self.feeder.not_finite(cut)
        return counts

    def _cuts(self, job: Job, size: int) -> Iterator[Job]:
        for first in range(job.first, job.first + job.count, size):
            yield Job(job.name, job.part, first, min(size, job.first + job.count - first))

    def _load(self, cut: Job, space: Workspace) -> NDArray[Any]:
        """The operands of a cut, (M + 1, >= count) uint16 bits of bf16, or fp32."""
        loaded = self.feeder.sources(cut, space)
        code = load(loaded.files, cut.first, cut.count, loaded.stored)
        if code != DONE:
            raise self.feeder.unreadable(cut, code - 1)
        return loaded.stored

    def _merge(self, group: Group, job: Job, sparsity: Sparsity, table: Doubles) -> Found:
        """Choose, combine and write one job."""
        names = range(group.models)
        keys = np.stack([stream_key(group.settings.seed, job.name, model) for model in names])
        products, squares = [], []
        with self.feeder.space() as space:
            for cut in self._cuts(job, self._step(job, sparsity)):
                stored = self._load(cut, space)
                table_of_blocks = np.zeros((-(-cut.count // BLOCK), 1 + pair_count(group.models)))
                gram(stored, cut.count, True, table_of_blocks)
                if not np.isfinite(table_of_blocks).all():
                    raise self.feeder.not_finite(cut)
                products.append(table_of_blocks)
                squares.append(self._combine(cut, sparsity, table, keys, space, stored))
        self.task.advance(self.feeder.job_bytes(job))
        return Found(job, np.concatenate(products), np.concatenate(squares))

    def _step(self, job: Job, sparsity: Sparsity) -> int:
        """Elements of a cut: whole rows where ranks within rows are wanted."""
        size = self.feeder.size
        return whole_rows(row_length(self.plan.layout[job.name][1]), size) if sparsity.by_rows else size

    def _combine(
        self,
        cut: Job,
        sparsity: Sparsity,
        table: Doubles,
        keys: NDArray[np.uint64],
        space: Workspace,
        stored: NDArray[Any],
    ) -> Doubles:
        """Compute and write one cut; squared norms of its merged delta."""
        dtype, shape = self.plan.layout[cut.name]
        unit = row_length(shape) if sparsity.by_rows else BLOCK
        squares = np.zeros(-(-cut.count // unit))
        span = np.array([cut.count, cut.first, unit], np.int64)
        data = space.out[0, : cut.count * ITEM_BYTES[dtype]]
        kind = KINDS[dtype]
        if not sparse_combine(stored, span, table, keys, sparsity.consensus, space.rows, data, kind, squares):
            raise InputError(f"the merge of {printable(cut.name)} does not fit {dtype}", "give --dtype float32")
        place = cut.first * ITEM_BYTES[dtype]
        self.output.checks.add(cut.name, [check_sum(data, place // 2)])
        self.output.writers[0].write(cut.name, place, data)
        return squares

    def _report(self, group: Group, found: Sequence[Found]) -> GroupReport:
        parameters = sum(item.job.count for item in found)
        columns = np.concatenate([item.products for item in found]).T if found else np.zeros((1, 0))
        sums = [fsum(column.tolist()) for column in columns]
        matrix = gram_of(sums[1:], group.models)
        row = report_group(group.name, parameters, sums[0], matrix, self.plan.method.mix(group, matrix))
        return replace(row, result_norms=(sqrt(fsum(value for item in found for value in item.squares.tolist())),))
