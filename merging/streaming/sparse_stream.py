"""Streams merges that choose elements (TIES, DARE, DELLA, Breadcrumbs) through their kernels.

If magnitudes decide, a counting pass over a group finds its exact thresholds (see `top_k`); another pass chooses,
combines and writes. Random masks depend on (seed, tensor, model, index) only. The result is bit for bit the same for
any number of threads, size of cut and division into shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import fsum, sqrt
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from gemma2.core.progress import Task
from gemma2.merging.kernels.dense import BLOCK, gram, pair_count
from gemma2.merging.kernels.file_passes import DONE
from gemma2.merging.kernels.number_formats import Doubles
from gemma2.merging.kernels.philox import stream_key
from gemma2.merging.kernels.sparse import scratch, sparse_combine
from gemma2.merging.kernels.sparsity import Sparsity
from gemma2.merging.kernels.top_k import (
    BINS,
    COARSE,
    MIXED,
    PIECE,
    WINDOW,
    Window,
    count_near,
    counting_space,
    magnitude,
    near_rank,
    place_of_rank,
    sample,
    sample_places,
    window_near,
)
from gemma2.merging.methods.method import Group, Selection
from gemma2.merging.plan.merge_plan import MergePlan

from .dense_stream import Output
from .feeder import Block, Feeder, in_order, row_length, whole_rows
from .group_report import GroupReport, gram_of, report_group

__all__ = ["ChoosingStream", "RowJobs"]

SAMPLE = 1 << 17, 1 << 20  # least and most elements in the sample of a group, of each model
SHARE = 32  # between these limits, one element in SHARE is sampled


@dataclass(frozen=True)
class Found:
    """The sums of one job: inner products per block, (blocks, 1 + pairs), and squared norms of the merged delta."""

    job: Block
    products: Doubles
    squares: Doubles


@dataclass(frozen=True)
class Wanted:
    """A wanted magnitude: the rank-th largest of a model's `count` deltas."""

    model: int
    rank: int
    count: int


class RowJobs:
    """Jobs of whole rows."""

    plan: MergePlan
    feeder: Feeder

    def _row_jobs(self, group: Group) -> Iterator[Block]:
        """Yield jobs of whole rows, for ranks within rows."""
        for name in group.tensors:
            part = self.plan.parts[name]
            count = part.sources[0].count
            step = whole_rows(row_length(self.plan.layout[name][1]), self.feeder.size)
            for first in range(0, count, step):
                yield Block(name, part, first, min(step, count - first))


class ChoosingStream(RowJobs):
    """One or two passes over each group."""

    def __init__(self, plan: MergePlan, feeder: Feeder, output: Output, task: Task, selection: Selection) -> None:
        self.plan = plan
        self.feeder = feeder
        self.output = output
        self.task = task
        self.selection = selection
        self._counted: set[str] = set()  # groups that a counting pass has read

    def run(self) -> Iterator[GroupReport]:
        """Merge group after group."""
        with self.plan.arrivals.pool(self.feeder.workers) as pool:
            for group in self.plan.groups:
                sparsity = self._with_thresholds(pool, group, self.selection.of(group))
                jobs = self._row_jobs(group) if sparsity.by_rows else self.feeder.jobs(group)
                merged = in_order(pool, lambda job: self._merge(group, job, sparsity), jobs, 2 * self.feeder.workers)  # noqa: B023
                found = []
                for item in merged:
                    self.output.wrote(item.job.name, item.job.first + item.job.count)
                    found.append(item)
                yield self._report(group, found)

    def _with_thresholds(self, pool: ThreadPoolExecutor, group: Group, sparsity: Sparsity) -> Sparsity:
        """Return the settings with the exact magnitudes between which elements are kept."""
        count = sum(self.plan.parts[name].sources[0].count for name in group.tensors)
        if self.selection.by != "magnitude" or count == 0:
            return sparsity
        limits = self.selection.ranks(group, count)  # (first, last) of each model
        lows = [Wanted(model, last, count) for model, (_, last) in enumerate(limits)]
        highs = [Wanted(model, first, count) for model, (first, _) in enumerate(limits) if first > 1]
        found = self._find(pool, group, [*(item for item in lows if item.rank < count), *highs])
        low = tuple(found.get(wanted, 0.0) for wanted in lows)  # 0.0: rank `count` keeps every element
        high = tuple(found.get(Wanted(m, first, count), np.inf) for m, (first, _) in enumerate(limits))
        return replace(sparsity, low=low, high=high)

    def _find(self, pool: ThreadPoolExecutor, group: Group, wanted: list[Wanted]) -> dict[Wanted, float]:
        """Return the wanted magnitudes of a group: by a sample that is the whole group, else by counting near it."""
        bits = self._sample(group)
        if not wanted or bits.shape[1] == wanted[0].count:
            self.task.advance(sum(self.feeder.job_bytes(job) for job in self.feeder.jobs(group)))
            return {item: magnitude(near_rank(bits[item.model], item.rank, item.count)) for item in wanted}
        found: dict[Wanted, float] = {}
        windows = {item: window_near(bits[item.model], item.rank, item.count) for item in wanted}
        while windows:  # three times at most
            counted = self._count(pool, group, windows)
            found |= {item: magnitude(place) for item, (place, exact) in counted.items() if exact}
            windows = {
                item: (counted[item][0], 0) if item in counted else (0, COARSE) for item in windows if item not in found
            }
        return found

    def _sample(self, group: Group) -> NDArray[np.uint32]:
        """Return bit patterns of a sample of the deltas of each model, (M, n); of all deltas if they are few."""
        counts = {name: self.plan.parts[name].sources[0].count for name in group.tensors}
        total = sum(counts.values())
        size = min(max(total // SHARE, SAMPLE[0]), SAMPLE[1])
        size = total if total <= 2 * SAMPLE[0] else size
        found = [self._sample_tensor(group, name, -(-size * count // total)) for name, count in counts.items()]
        return np.concatenate(found, axis=1)

    def _sample_tensor(self, group: Group, name: str, size: int) -> NDArray[np.uint32]:
        part = self.plan.parts[name]
        count = part.sources[0].count
        for source in part.sources:
            self.feeder.reader.wait(source.tensor)
        places = sample_places(count, size)
        bits = np.empty((group.models, int(np.minimum(count - places, PIECE).sum())), np.uint32)
        with self.feeder.space() as space:
            done = 0
            while len(places):
                job = Block(name, part, int(places[0]), int(min(PIECE, count - places[0])))
                loaded = self.feeder.sources(job, space)
                now = len(places) if loaded.files[0, 0] >= 0 else 1  # converted operands are loaded piece by piece
                code = sample(loaded.files, places[:now], count, loaded.stored, bits[:, done:])
                if code != DONE:
                    raise self.feeder.unreadable(job, code - 1)
                done += job.count
                places = places[now:]
        return bits

    def _count(
        self, pool: ThreadPoolExecutor, group: Group, windows: dict[Wanted, Window]
    ) -> dict[Wanted, tuple[int, bool]]:
        """Return the first pattern of the bin that holds each wanted magnitude, and whether it is the only one there.

        Those outside of their window are missing.
        """
        table = np.array([(item.model + 1, *window) for item, window in windows.items()], np.int64)
        tables = [np.zeros((len(table), 1 + BINS), np.int64) for _ in range(self.feeder.workers)]
        first_time = group.name not in self._counted
        free: SimpleQueue[NDArray[np.int64]] = SimpleQueue()
        for counts in tables:
            free.put(counts)

        def count(job: Block) -> Block:
            counts = free.get()
            with self.feeder.space() as space:
                stored = self.feeder.load(job, space, first_time=first_time)
                count_near(stored, job.count, table, counts, counting_space())
            free.put(counts)
            return job

        self._counted.add(group.name)
        for job in in_order(pool, count, self.feeder.jobs(group), 2 * self.feeder.workers):
            if first_time:
                self.task.advance(self.feeder.job_bytes(job))
        total = sum(tables[1:], start=tables[0])
        places = {}
        for (item, (first, shift)), row in zip(windows.items(), total, strict=True):
            counts = row[1 : 1 + WINDOW]
            place = place_of_rank(counts % MIXED, int(row[0]), item.rank)
            if place is not None:
                places[item] = first + (place << shift), bool(counts[place] < MIXED)
        return places

    def _merge(self, group: Group, job: Block, sparsity: Sparsity) -> Found:
        """Choose, combine and write one job."""
        name, count = job.name, job.count
        unit = row_length(self.plan.layout[name][1]) if sparsity.by_rows else BLOCK
        products = np.zeros((-(-count // BLOCK), 1 + pair_count(group.models)))
        squares = np.zeros(-(-count // unit))
        keys = np.stack([stream_key(group.settings.seed, name, model) for model in range(group.models)])
        settings = (sparsity.table(), keys, sparsity.consensus)
        work = scratch(group.models, unit, sparsity.by_rows)
        with self.feeder.space() as space:
            stored = self.feeder.load(job, space, first_time=group.name not in self._counted)
            gram(stored, count, True, products)
            if not np.isfinite(products).all():
                raise self.feeder.not_finite(job)
            out = self.output.rows(name, space)[0, :count]
            if not sparse_combine(stored, (count, job.first, unit), settings, space.rows, work, out, squares):
                raise self.output.overflow(name)
            self.output.write(name, job.first, count, space)
        self.task.advance(self.feeder.job_bytes(job))
        return Found(job, products, squares)

    def _report(self, group: Group, found: Sequence[Found]) -> GroupReport:
        parameters = sum(item.job.count for item in found)
        columns = np.concatenate([item.products for item in found]).T if found else np.zeros((1, 0))
        sums = [fsum(column.tolist()) for column in columns]
        matrix = gram_of(sums[1:], group.models)
        row = report_group(group.name, parameters, sums[0], matrix, self.plan.method.mix(group, matrix))
        return replace(row, result_norms=(sqrt(fsum(value for item in found for value in item.squares.tolist())),))
