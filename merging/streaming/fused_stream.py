"""Streams the compiled methods by elements (`kernels.elements`): counts scores, sums, then computes and writes.

Counts are integers and sums are those of fixed units, added up exactly rounded: the result is bit for bit the same for
any number of threads, size of cut and division into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import fsum, sqrt
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from gemma2.core.progress import Task
from gemma2.merging.kernels.dense import BLOCK, pair_count
from gemma2.merging.kernels.elements import (
    ARCEE,
    HALF,
    NEARSWAP,
    RAM,
    SCE,
    combine_elements,
    count_scores,
    scratch,
    sum_elements,
)
from gemma2.merging.kernels.number_formats import Doubles, Stored
from gemma2.merging.methods.method import Fused, Group, scores_of_ranks
from gemma2.merging.plan.merge_plan import MergePlan

from .dense_stream import Output
from .feeder import Block, Feeder, Workspace, in_order, row_length
from .group_report import GroupReport, gram_of, report_group
from .sparse_stream import RowJobs

__all__ = ["FusedStream"]

CODES = {"sce": SCE, "ram": RAM, "nearswap": NEARSWAP, "arcee": ARCEE}


class FusedStream(RowJobs):
    """One to four passes over each group."""

    def __init__(self, plan: MergePlan, feeder: Feeder, output: Output, task: Task, fused: Fused) -> None:
        self.plan = plan
        self.feeder = feeder
        self.output = output
        self.task = task
        self.fused = fused
        self.kind = CODES[fused.kind]

    def run(self) -> Iterator[GroupReport]:
        """Merge group after group."""
        with self.plan.arrivals.pool(self.feeder.workers) as pool:
            for group in self.plan.groups:
                yield self._merge(pool, group)

    def _merge(self, pool: ThreadPoolExecutor, group: Group) -> GroupReport:
        divergences = {name: np.zeros(self._units(name) if self.kind == ARCEE else 0) for name in group.tensors}
        done = 0  # passes
        numbers = np.ones(1 + group.models)
        numbers[0] = self.fused.first(group)
        ranks = self.fused.ranks
        if ranks is not None and ranks(group, 1):

            def counted(bins: Sequence[int]) -> NDArray[np.int64]:
                nonlocal done
                done += 1
                return self._count(pool, group, bins, divergences, done - 1)

            found = scores_of_ranks(lambda: counted(())[0], counted, lambda count: ranks(group, count))
            numbers[0] = self.fused.limit(found)
        if self.fused.weights is not None:
            numbers[1:] = self.fused.weights(group, self._sums(pool, group, numbers, done))
            done += 1
        size = sum(self.feeder.job_bytes(job) for job in self._jobs(group))
        self.task.advance(size * (self.fused.looks - done))
        sums: list[Doubles] = []
        for job, own in self._ordered(pool, lambda job: self._write(job, numbers, divergences, done), group):
            sums.append(own)
            self.output.wrote(job.name, job.first + job.count)
            self.task.advance(self.feeder.job_bytes(job))
        return self._report(group, sums)

    def _ordered(
        self, pool: ThreadPoolExecutor, function: Callable[[Block], tuple[Block, Doubles]], group: Group
    ) -> Iterator[tuple[Block, Doubles]]:
        return in_order(pool, function, self._jobs(group), 2 * self.feeder.workers)

    def _jobs(self, group: Group) -> Iterator[Block]:
        return self._row_jobs(group) if self.kind == ARCEE else self.feeder.jobs(group)

    def _unit(self, name: str) -> int:
        """Return the elements over which sums and divergences are taken."""
        return row_length(self.plan.layout[name][1]) if self.kind == ARCEE else BLOCK

    def _units(self, name: str) -> int:
        return -(-self.plan.parts[name].sources[0].count // self._unit(name))

    def _span(self, job: Block) -> tuple[int, int]:
        return job.count, self._unit(job.name)

    def _load(self, job: Block, space: Workspace, number: int) -> Stored:
        """Read the operands of a job in a pass over its group, counted from 0."""
        return self.feeder.load(job, space, first_time=number == 0)

    def _own(self, job: Block, divergences: dict[str, Doubles]) -> Doubles:
        """Return the divergences of a job's rows; of a kind without them, none."""
        first = job.first // self._unit(job.name)
        return divergences[job.name][first : first + -(-job.count // self._unit(job.name))]

    def _count(
        self,
        pool: ThreadPoolExecutor,
        group: Group,
        bins: Sequence[int],
        divergences: dict[str, Doubles],
        number: int,
    ) -> NDArray[np.int64]:
        """Return how many scores have each upper half of bits, or of those in the bins each lower half."""
        tables = [np.zeros((max(len(bins), 1), HALF), np.int64) for _ in range(self.feeder.workers)]
        free: SimpleQueue[NDArray[np.int64]] = SimpleQueue()
        for counts in tables:
            free.put(counts)
        wanted = np.array(bins, np.int64)

        def count(job: Block) -> tuple[Block, Doubles]:
            counts = free.get()
            with self.feeder.space() as space:
                stored, own = self._load(job, space, number), self._own(job, divergences)
                count_scores(self._span(job), self.kind, (stored, own), scratch(group.models), wanted, counts)
            free.put(counts)
            return job, own

        for job, _ in self._ordered(pool, count, group):
            self.task.advance(self.feeder.job_bytes(job))
        return sum(tables[1:], start=tables[0])

    def _sums(self, pool: ThreadPoolExecutor, group: Group, numbers: Doubles, number: int) -> Doubles:
        """Return the sums over a group, (M, 2)."""
        parts: list[Doubles] = []

        def add(job: Block) -> tuple[Block, Doubles]:
            sums = np.zeros((-(-job.count // self._unit(job.name)), 2 * group.models))
            with self.feeder.space() as space:
                stored = self._load(job, space, number)
                sum_elements(self._span(job), self.kind, numbers, stored, scratch(group.models), sums)
            return job, sums

        for job, sums in self._ordered(pool, add, group):
            parts.append(sums)
            self.task.advance(self.feeder.job_bytes(job))
        return np.array(_exact(parts, 2 * group.models)).reshape(group.models, 2)

    def _write(
        self, job: Block, numbers: Doubles, divergences: dict[str, Doubles], number: int
    ) -> tuple[Block, Doubles]:
        """Compute and write one job; return its sums per unit, see `combine_elements`."""
        name = job.name
        with self.feeder.space() as space:
            stored = self._load(job, space, number)
            models = len(stored) - 1
            sums = np.zeros((-(-job.count // self._unit(name)), 2 + pair_count(models)))
            settings = (self.kind, numbers, self._own(job, divergences))
            out = self.output.rows(name, space)[0, : job.count]
            fits = combine_elements(self._span(job), settings, stored, scratch(models), space.rows[0], out, sums)
            if not np.isfinite(sums).all():
                raise self.feeder.not_finite(job)
            if not fits:
                raise self.output.overflow(name)
            self.output.write(name, job.first, job.count, space)
        return job, sums

    def _report(self, group: Group, parts: Sequence[Doubles]) -> GroupReport:
        sums = _exact(parts, 2 + pair_count(group.models))
        matrix = gram_of(sums[1:-1], group.models)
        count = sum(self.plan.parts[name].sources[0].count for name in group.tensors)
        row = report_group(group.name, count, sums[0], matrix, self.plan.method.mix(group, matrix))
        return replace(row, result_norms=(sqrt(sums[-1]),))


def _exact(parts: Sequence[Doubles], columns: int) -> list[float]:
    """Return the exactly rounded sums of the columns."""
    table = np.concatenate(parts).T if parts else np.zeros((columns, 0))
    return [fsum(column.tolist()) for column in table]
