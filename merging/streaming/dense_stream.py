"""Streams the groups of a plan through the kernels. Memory holds jobs, never a whole tensor.

Per group: pass 1 reads the operands and sums their inner products, the method turns the Gram matrix into weights, pass
2 reads the operands again (from the page cache) and writes the combination. Pass 1 is a group ahead, so that no thread
waits for the end of a group. Methods whose weights are known beforehand, or whose sums are cached, need one pass. What
is read first is hashed on the way, for the record of the inputs.

Jobs are multiples of the kernels' block, and sums over blocks and tensors are exactly rounded (`math.fsum`): the result
is bit for bit the same for any number of threads, size of job and division into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import fsum
from threading import Event, Lock

import numpy as np

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable
from gemma2.core.progress import Task
from gemma2.merging.kernels.dense import BLOCK, check_sum, combine, gram, pair_count
from gemma2.merging.kernels.number_formats import STORED, Doubles, Out, Stored
from gemma2.merging.methods.method import Group, Mix
from gemma2.merging.plan.merge_plan import MergePlan

from .feeder import Block, Feeder, Workspace, in_order
from .gram_cache import Products
from .group_report import GroupReport, gram_of, report_group
from .read_back import ReadBack
from .writer import Writer

__all__ = ["Checks", "Output", "Stream"]


class Stopped(Exception):
    """The merge failed elsewhere, so its pass ahead ends."""


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

    def __init__(self, plan: MergePlan, writers: Sequence[Writer], followers: Sequence[ReadBack] = ()) -> None:
        self.plan = plan
        self.writers = writers
        self.followers = followers
        self.checks = Checks(len(writers))

    def rows(self, name: str, space: Workspace) -> Out:
        """Return the rows for results in the work space, in the dtype of a tensor, (E, room)."""
        rows: Out = space.out.view(STORED[self.plan.layout[name][0]])
        return rows

    def overflow(self, name: str) -> InputError:
        """Return the error for a result that its dtype cannot hold."""
        return InputError(
            f"the merge of {printable(name)} overflows {self.plan.layout[name][0]}", "give --dtype float32"
        )

    def write(self, name: str, first: int, count: int, space: Workspace) -> None:
        """Write elements [first, first + count) from the start of the rows for results, and add their check sums."""
        item = ITEM_BYTES[self.plan.layout[name][0]]
        sums = []
        for writer, row in zip(self.writers, space.out, strict=True):
            data = row[: count * item]
            sums.append(int(check_sum(data, writer.places[name].offset + first * item)))
            writer.write(name, first * item, data)
        self.checks.add(name, sums)

    def wrote(self, name: str, count: int) -> None:
        """Announce that the first `count` elements of a tensor are written."""
        for follower in self.followers:
            follower.wrote(name, count * ITEM_BYTES[self.plan.layout[name][0]])


class Stream:
    """Linear combinations: one or two passes over each group."""

    def __init__(self, plan: MergePlan, feeder: Feeder, output: Output, task: Task, products: Products) -> None:
        self.plan = plan
        self.feeder = feeder
        self.output = output
        self.task = task
        self.products = products
        self._stopped = Event()

    def run(self) -> Iterator[GroupReport]:
        """Merge group after group."""
        groups = self.plan.groups
        with (
            ThreadPoolExecutor(1) as driver,
            self.plan.arrivals.pool(self.feeder.workers) as pool,
            self._stopping(),
        ):
            ahead = [driver.submit(self._known, pool, group) for group in groups[:1]]
            for number, group in enumerate(groups):
                known = ahead.pop().result()
                ahead += [driver.submit(self._known, pool, later) for later in groups[number + 1 : number + 2]]
                yield self._merge(pool, group, known)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """End the pass ahead as soon as the block fails."""
        try:
            yield
        except BaseException:
            self._stopped.set()
            raise

    def _known(self, pool: ThreadPoolExecutor, group: Group) -> dict[str, Doubles] | None:
        """Return the sums of a group's tensors, from pass 1 or an earlier merge; None if no pass 1 is needed."""
        known = self.products.known(group)
        if known is None and self.plan.method.adaptive:
            known = self._sums(group, self._ordered(pool, lambda job: self._measure(group, job), group))
            self.products.keep(group, known)
        return known

    def _merge(self, pool: ThreadPoolExecutor, group: Group, known: dict[str, Doubles] | None) -> GroupReport:
        gram = np.zeros((group.models, group.models)) if known is None else self._gram(group, known)
        mix = self.plan.method.mix(group, gram)
        wanted = known is None
        results = self._ordered(pool, lambda job: self._write(group, job, mix, wanted), group)
        found = self._sums(group, self._announced(results))
        if known is None:
            self.products.keep(group, found)
            known = found
        return self._report(group, known, mix)

    def _ordered(
        self, pool: ThreadPoolExecutor, function: Callable[[Block], tuple[Block, Doubles]], group: Group
    ) -> Iterator[tuple[Block, Doubles]]:
        return in_order(pool, function, self.feeder.jobs(group), 2 * self.feeder.workers)

    def _announced(self, results: Iterable[tuple[Block, Doubles]]) -> Iterator[tuple[Block, Doubles]]:
        for job, products in results:
            self.output.wrote(job.name, job.first + job.count)
            yield job, products

    def _measure(self, group: Group, job: Block) -> tuple[Block, Doubles]:
        """Return the inner products of one job per block, (blocks, 1 + pairs)."""
        if self._stopped.is_set():
            raise Stopped
        with self.feeder.space() as space:
            stored = self.feeder.load(job, space, first_time=True)
            return job, self._products_of(group, job, stored)

    def _products_of(self, group: Group, job: Block, stored: Stored) -> Doubles:
        """Return the inner products of a job. Raises InputError if a value is not finite."""
        products = np.zeros((-(-job.count // BLOCK), 1 + pair_count(group.models)))
        gram(stored, job.count, group.based, products)
        if not np.isfinite(products).all():
            raise self.feeder.not_finite(job)
        return products

    def _write(self, group: Group, job: Block, mix: Mix, wanted: bool) -> tuple[Block, Doubles]:
        """Combine and write one job; return its inner products if they are wanted."""
        with self.feeder.space() as space:
            stored = self.feeder.load(job, space, first_time=wanted)
            products = self._products_of(group, job, stored) if wanted else np.zeros((0, 1 + pair_count(group.models)))
            weights = np.ascontiguousarray(mix.weights)
            if not combine(stored, job.count, weights, space.rows[0], self.output.rows(job.name, space)):
                raise self.output.overflow(job.name)
            self.output.write(job.name, job.first, job.count, space)
            return job, products

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
