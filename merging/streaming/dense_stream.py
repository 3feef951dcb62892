"""Streams the groups of a plan through the kernels. Memory holds cuts, never a whole tensor.

Per group: pass 1 reads the operands and sums their inner products, the method turns the Gram matrix into weights, pass
2 reads the operands again (from the page cache) and writes the combination. Methods whose weights are known beforehand,
or whose sums are cached, need one pass.

Cuts are multiples of the kernels' block, and sums over blocks and tensors are exactly rounded (`math.fsum`): the result
is bit for bit the same for any number of threads, size of cut and division into shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import fsum
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import Gemma2Error, InputError, OutputError
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable
from gemma2.core.progress import Task
from gemma2.merging.kernels.dense import BLOCK, pair_count
from gemma2.merging.kernels.dtypes import STORED, Doubles, Out
from gemma2.merging.kernels.file_passes import DONE, NOT_FINITE, blend, measure
from gemma2.merging.methods.method import Group, Mix
from gemma2.merging.plan.merge_plan import MergePlan

from .feeder import Block, Feeder, Loaded, Workspace, in_order
from .gram_cache import Products
from .group_report import GroupReport, gram_of, report_group
from .writer import Writer

__all__ = ["Checks", "Output", "Stream"]


class Checks:
    """Check sums of the written data, by output and tensor. Safe to share between threads."""

    def __init__(self, outputs: int) -> None:
        self.sums: list[dict[str, int]] = [{} for _ in range(outputs)]
        self._lock = Lock()

    def add(self, name: str, sums: Sequence[int]) -> None:
        """Add the sums of one job, one per output."""
        with self._lock:
            for known, own in zip(self.sums, sums, strict=True):
                known[name] = (known.get(name, 0) + int(own)) % 2**64


class Output:
    """The target of the streams: the outputs, the dtype of each tensor, and the check sums of the written data."""

    def __init__(self, plan: MergePlan, writers: Sequence[Writer]) -> None:
        self.plan = plan
        self.writers = writers
        self.checks = Checks(len(writers))

    def targets(self, name: str) -> NDArray[np.int64]:
        """Return descriptor and offset of a tensor in each output, (E, 2)."""
        places = [writer.places[name] for writer in self.writers]
        return np.array([(place.descriptor, place.offset) for place in places], np.int64)

    def rows(self, name: str, space: Workspace) -> Out:
        """Return the rows for results in the work space, in the dtype of a tensor, (E, cut)."""
        rows: Out = space.out.view(STORED[self.plan.layout[name][0]])
        return rows

    def failure(self, name: str, code: int, job: Block, space: Workspace) -> Gemma2Error:
        """Return the reason why a compiled pass failed: the write is repeated in Python, which reports the system's."""
        dtype = self.plan.layout[name][0]
        if code == NOT_FINITE:
            return InputError(f"the merge of {printable(name)} overflows {dtype}", "give --dtype float32")
        writer = self.writers[NOT_FINITE - 1 - code]
        try:
            count = min(job.count, space.out.shape[1] // 4)
            writer.write(name, job.first * ITEM_BYTES[dtype], space.out[0, : count * ITEM_BYTES[dtype]])
        except OutputError as error:
            return error
        return OutputError(f"writing to {writer.directory} failed once", "check the disk, and merge again")


class Stream:
    """Linear combinations: one or two passes over each group."""

    def __init__(self, plan: MergePlan, feeder: Feeder, output: Output, task: Task, products: Products) -> None:
        self.plan = plan
        self.feeder = feeder
        self.output = output
        self.task = task
        self.products = products

    def run(self) -> Iterator[GroupReport]:
        """Merge group after group."""
        with self.plan.arrivals.pool(self.plan.request.threads) as pool:
            for group in self.plan.groups:
                yield self._merge(pool, group)

    def _merge(self, pool: ThreadPoolExecutor, group: Group) -> GroupReport:
        known = self.products.known(group)
        if known is None and self.plan.method.adaptive:
            known = self._sums(group, in_order(pool, lambda job: self._measure(group, job), self.feeder.jobs(group)))
            self.products.keep(group, known)
        gram = np.zeros((group.models, group.models)) if known is None else self._gram(group, known)
        mix = self.plan.method.mix(group, gram)
        wanted = known is None
        found = self._sums(
            group, in_order(pool, lambda job: self._write(group, job, mix, wanted), self.feeder.jobs(group))
        )
        if known is None:
            self.products.keep(group, found)
            known = found
        return self._report(group, known, mix)

    def _measure(self, group: Group, job: Block) -> tuple[Block, Doubles]:
        """Return the inner products of one job per block, (blocks, 1 + pairs)."""
        with self.feeder.space() as space:
            loaded = self.feeder.sources(job, space)
            products = self._table(group, job)
            span = (job.first, job.count, self.feeder.size)
            code = measure(loaded.files, span, group.based, loaded.stored, products)
            if code != DONE:
                raise self.feeder.unreadable(job, code - 1)
            self._check_finite(job, products)
            return job, products

    def _write(self, group: Group, job: Block, mix: Mix, wanted: bool) -> tuple[Block, Doubles]:
        """Combine and write one job; return its inner products if they are wanted."""
        with self.feeder.space() as space:
            loaded = self.feeder.sources(job, space)
            products = self._table(group, job)[: None if wanted else 0]
            code = self._blend(group, job, mix, loaded, space, products)
            if wanted:
                self._check_finite(job, products)
            if code > 0:
                raise self.feeder.unreadable(job, code - 1)
            if code != DONE:
                raise self.output.failure(job.name, code, job, space)
            return job, products

    def _blend(self, group: Group, job: Block, mix: Mix, loaded: Loaded, space: Workspace, products: Doubles) -> int:
        checks = np.zeros(len(self.output.writers), np.uint64)
        code = blend(
            loaded.files,
            (job.first, job.count, self.feeder.size),
            np.ascontiguousarray(mix.weights),
            self.output.targets(job.name),
            (loaded.stored, space.rows[0], self.output.rows(job.name, space)),
            checks,
            group.based,
            products,
        )
        self.output.checks.add(job.name, checks.tolist())
        return int(code)

    def _table(self, group: Group, job: Block) -> Doubles:
        return np.zeros((-(-job.count // BLOCK), 1 + pair_count(group.models)))

    def _check_finite(self, job: Block, products: Doubles) -> None:
        if not np.isfinite(products).all():
            raise self.feeder.not_finite(job)

    def _sums(self, group: Group, results: Iterable[tuple[Block, Doubles]]) -> dict[str, Doubles]:
        """Return exactly rounded sums over the blocks of each tensor, (1 + pairs,)."""
        blocks: dict[str, list[Doubles]] = {}
        sums = {name: np.zeros(1 + pair_count(group.models)) for name in group.tensors}
        for job, products in results:
            blocks.setdefault(job.name, []).append(products)
            self.task.advance(self.feeder.job_bytes(job))
            if job.first + job.count == job.part.sources[0].count:
                columns = np.concatenate(blocks.pop(job.name)).T
                sums[job.name] = np.array([fsum(column.tolist()) for column in columns])
        return sums

    def _total(self, group: Group, sums: dict[str, Doubles]) -> Doubles:
        return np.array([fsum(column) for column in zip(*(sums[name] for name in group.tensors), strict=True)])

    def _gram(self, group: Group, sums: dict[str, Doubles]) -> Doubles:
        """Return the Gram matrix (M, M) of a group from the upper triangles of its tensors."""
        return gram_of(self._total(group, sums)[1:].tolist(), group.models)

    def _report(self, group: Group, sums: dict[str, Doubles], mix: Mix) -> GroupReport:
        parameters = sum(self.plan.parts[name].sources[0].count for name in group.tensors)
        base_square = float(self._total(group, sums)[0]) if group.based else None
        return report_group(group.name, parameters, base_square, self._gram(group, sums), mix)
