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

from gemma2.core.outputs.safetensors_header import ITEM_BYTES, PAGE_BYTES
from gemma2.core.progress import Task
from gemma2.merging.kernels.dense import BLOCK, pair_count
from gemma2.merging.kernels.dtypes import Doubles
from gemma2.merging.kernels.file_passes import DONE
from gemma2.merging.kernels.philox import stream_key
from gemma2.merging.kernels.sparse import Sparsity, blend_chosen
from gemma2.merging.kernels.top_k import (
    BINS,
    COARSE,
    PIECE,
    WINDOW,
    count_near,
    magnitude,
    near_rank,
    place_of_rank,
    sample,
    sample_places,
)
from gemma2.merging.methods.method import Group, Selection
from gemma2.merging.plan.merge_plan import MergePlan

from .dense_stream import Output
from .feeder import CUTS_IN_A_JOB, Block, Feeder, in_order, row_length, whole_rows
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
    """Jobs and cuts of whole rows."""

    plan: MergePlan
    feeder: Feeder

    def _row_jobs(self, group: Group) -> Iterator[Block]:
        """Yield jobs of whole rows, for ranks within rows."""
        long = {job.name for job in self.feeder.jobs(group) if job.count > self.feeder.size}
        for name in group.tensors:
            part = self.plan.parts[name]
            count = part.sources[0].count
            step = self._step(name) * (CUTS_IN_A_JOB if name in long and self._in_pages(name) else 1)
            for first in range(0, count, step):
                yield Block(name, part, first, min(step, count - first))

    def _step(self, name: str) -> int:
        """Return the number of elements in a cut of whole rows."""
        return whole_rows(row_length(self.plan.layout[name][1]), self.feeder.size)

    def _in_pages(self, name: str) -> bool:
        """Whether cuts of whole rows are whole pages, as writes past the page cache require."""
        return self._step(name) * ITEM_BYTES[self.plan.layout[name][0]] % PAGE_BYTES == 0


class ChoosingStream(RowJobs):
    """One or two passes over each group."""

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
                jobs = self._row_jobs(group) if sparsity.by_rows else self.feeder.jobs(group)
                found = list(in_order(pool, lambda job: self._merge(group, job, sparsity), jobs))  # noqa: B023
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
        near = {item: near_rank(bits[item.model], item.rank, item.count) for item in wanted}
        if not wanted or bits.shape[1] == wanted[0].count:
            self.task.advance(sum(self.feeder.job_bytes(job) for job in self.feeder.jobs(group)))
            return {item: magnitude(place) for item, place in near.items()}
        windows = {item: (max(place - WINDOW // 2, 0), 0) for item, place in near.items()}
        found = self._count(pool, group, windows, advance=True)
        missed = [item for item in wanted if item not in found]
        if missed:
            coarse = self._count(pool, group, dict.fromkeys(missed, (0, COARSE)))
            found |= self._count(pool, group, {item: (place << COARSE, 0) for item, place in coarse.items()})
        return {item: magnitude(place) for item, place in found.items()}

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
        self,
        pool: ThreadPoolExecutor,
        group: Group,
        windows: dict[Wanted, tuple[int, int]],
        advance: bool = False,
    ) -> dict[Wanted, int]:
        """Return the pattern of each wanted magnitude, in units of its window's bins; those outside are missing."""
        table = np.array([(item.model + 1, *window) for item, window in windows.items()], np.int64)
        size = (len(table), 1 + BINS)  # the number above a window, then its bins
        tables = [np.zeros(size, np.int64) for _ in range(self.plan.request.threads)]
        free: SimpleQueue[NDArray[np.int64]] = SimpleQueue()
        for counts in tables:
            free.put(counts)

        def count(job: Block) -> Block:
            counts = free.get()
            self._count_job(job, table, counts)
            free.put(counts)
            return job

        for job in in_order(pool, count, self.feeder.jobs(group)):
            if advance:
                self.task.advance(self.feeder.job_bytes(job))
        total = sum(tables[1:], start=tables[0])
        places = {
            item: place_of_rank(row[1 : 1 + WINDOW], int(row[0]), item.rank)
            for item, row in zip(windows, total, strict=True)
        }
        return {item: windows[item][0] + place for item, place in places.items() if place is not None}

    def _count_job(self, job: Block, windows: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        with self.feeder.space() as space:
            loaded = self.feeder.sources(job, space)
            span = (job.first, job.count, self.feeder.size)
            code = count_near(loaded.files, span, loaded.stored, windows, counts)
            if code != DONE:
                raise self.feeder.unreadable(job, code - 1)

    def _merge(self, group: Group, job: Block, sparsity: Sparsity) -> Found:
        """Choose, combine and write one job."""
        name = job.name
        dtype, shape = self.plan.layout[name]
        unit = row_length(shape) if sparsity.by_rows else BLOCK
        cut = self._step(name) if sparsity.by_rows else self.feeder.size
        paged = not sparsity.by_rows or self._in_pages(name)
        whole, rest = divmod(job.count, cut)
        products = np.zeros((whole * -(-cut // BLOCK) + -(-rest // BLOCK), 1 + pair_count(group.models)))
        squares, checks = np.zeros(-(-job.count // unit)), np.zeros(1, np.uint64)
        place = self.output.writers[0].places[name]
        keys = np.stack([stream_key(group.settings.seed, name, model) for model in range(group.models)])
        with self.feeder.space() as space:
            loaded = self.feeder.sources(job, space)
            code = blend_chosen(
                loaded.files,
                (job.first, job.count, cut, unit),
                (sparsity.table(), keys, sparsity.consensus),
                (place.descriptor if paged else -1, place.offset),
                (loaded.stored, space.rows, self.output.rows(name, space)),
                checks,
                products,
                squares,
            )
            if code > 0:
                raise self.feeder.unreadable(job, code - 1)
            if not np.isfinite(products).all():
                raise self.feeder.not_finite(job)
            if code != DONE:
                raise self.output.failure(name, code, job, space)
            if not paged:
                data = space.out[0, : job.count * ITEM_BYTES[dtype]]
                self.output.writers[0].write(name, job.first * ITEM_BYTES[dtype], data)
        self.output.checks.add(name, checks.tolist())
        self.task.advance(self.feeder.job_bytes(job))
        return Found(job, products, squares)

    def _report(self, group: Group, found: Sequence[Found]) -> GroupReport:
        parameters = sum(item.job.count for item in found)
        columns = np.concatenate([item.products for item in found]).T if found else np.zeros((1, 0))
        sums = [fsum(column.tolist()) for column in columns]
        matrix = gram_of(sums[1:], group.models)
        row = report_group(group.name, parameters, sums[0], matrix, self.plan.method.mix(group, matrix))
        return replace(row, result_norms=(sqrt(fsum(value for item in found for value in item.squares.tolist())),))
