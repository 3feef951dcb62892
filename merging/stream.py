"""Streams the groups of a plan through the kernels. Holds cuts in memory, never a tensor.

Per group: pass 1 reads the operands and sums their inner products, the method turns the Gram matrix into weights, pass
2 reads them again (from the page cache) and writes the combination. Methods whose weights are known beforehand do both
on one read.

Cuts are multiples of the kernels' block, and sums over blocks and tensors are exactly rounded (`math.fsum`): the result
is the same bit for bit for any number of threads, size of cut and division into shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import fsum
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Reader
from .errors import InputError
from .header import ITEM_BYTES, printable
from .kernels import BLOCK, KINDS, combine, gram, pair_count, widen
from .methods import Mix
from .plan import Group, MergePlan
from .progress import Task
from .report import GroupReport, report_group
from .writer import Writer

__all__ = ["CUT", "Stream"]

CUT = 256 * 1024  # elements that a thread reads, computes and writes at a time: 1.5 MB for three bf16 operands

Doubles = NDArray[np.float64]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Cut:
    """Elements [first, first + count) of one tensor."""

    name: str
    first: int
    count: int


class Workspace:
    """The buffers of one thread."""

    def __init__(self, operands: int, outputs: int, cut: int) -> None:
        self.raw = np.empty((operands, cut * 4), np.uint8)
        self.rows = np.empty((operands + 1, BLOCK), np.float32)
        self.out = np.empty((outputs, cut * 4), np.uint8)


class Stream:
    """One pass over the plan's groups. `cut` is a multiple of BLOCK."""

    def __init__(self, plan: MergePlan, reader: Reader, writers: Sequence[Writer], task: Task, cut: int = CUT) -> None:
        self.plan = plan
        self.reader = reader
        self.writers = writers
        self.task = task
        self.cut = cut
        self.vectors = len(plan.models)
        self._free: SimpleQueue[Workspace] = SimpleQueue()
        largest = max(tensor.count for tensor in plan.models[0].tensors.values())
        size = min(cut, -(-largest // BLOCK) * BLOCK)
        for _ in range(plan.request.threads):
            self._free.put(Workspace(len(plan.operands), len(writers), size))

    def run(self) -> Iterator[GroupReport]:
        """Merge group after group."""
        with ThreadPoolExecutor(self.plan.request.threads) as pool:
            for group in self.plan.groups:
                yield self._adaptive(pool, group) if self.plan.method.adaptive else self._fixed(pool, group)

    def _adaptive(self, pool: ThreadPoolExecutor, group: Group) -> GroupReport:
        """Two passes: the weights depend on the data."""
        sums = self._sum(_in_order(pool, self._measure, self._cuts(group)))
        mix = self.plan.method.mix(self.plan.request, self._gram(sums), group.name)
        for _ in _in_order(pool, lambda cut: self._write(cut, mix), self._cuts(group)):
            pass
        return self._report(group, sums, mix)

    def _fixed(self, pool: ThreadPoolExecutor, group: Group) -> GroupReport:
        """One pass: inner products are for the report and to find what is not finite."""
        mix = self.plan.method.mix(self.plan.request, np.zeros((self.vectors, self.vectors)), group.name)
        sums = self._sum(_in_order(pool, lambda cut: self._measure(cut, mix), self._cuts(group)))
        return self._report(group, sums, mix)

    def _report(self, group: Group, sums: Doubles, mix: Mix) -> GroupReport:
        parameters = sum(self.plan.models[0].tensors[name].count for name in group.tensors)
        base_square = float(sums[0]) if self.plan.base else None
        return report_group(group.name, parameters, base_square, self._gram(sums), mix)

    def _cuts(self, group: Group) -> Iterator[Cut]:
        for name in group.tensors:
            count = self.plan.models[0].tensors[name].count
            for first in range(0, count, self.cut):
                yield Cut(name, first, min(self.cut, count - first))

    def _measure(self, cut: Cut, mix: Mix | None = None) -> tuple[Cut, Doubles]:
        """Inner products of one cut per block, (blocks, 1 + pairs); with `mix` the combination is written too."""
        space = self._free.get()
        try:
            kinds = self._load(cut, space)
            products = np.empty((-(-cut.count // BLOCK), 1 + pair_count(self.vectors)))
            gram(space.raw, kinds, cut.count, self.plan.base is not None, space.rows, products)
            if not np.isfinite(products).all():
                raise self._not_finite(cut, space)
            if mix is not None:
                self._store(cut, mix, space, kinds)
            return cut, products
        finally:
            self._free.put(space)

    def _write(self, cut: Cut, mix: Mix) -> None:
        """Combine and write one cut."""
        space = self._free.get()
        try:
            self._store(cut, mix, space, self._load(cut, space))
        finally:
            self._free.put(space)

    def _load(self, cut: Cut, space: Workspace) -> NDArray[np.int64]:
        """Read one cut of every operand; returns how each is encoded."""
        tensors = [model.tensors[cut.name] for model in self.plan.operands]
        for tensor, row in zip(tensors, space.raw, strict=True):
            self.reader.read(tensor, cut.first, cut.count, row)
        return np.array([KINDS[tensor.dtype] for tensor in tensors])

    def _store(self, cut: Cut, mix: Mix, space: Workspace, kinds: NDArray[np.int64]) -> None:
        dtype = self.plan.layout[cut.name][0]
        item = ITEM_BYTES[dtype]
        weights = np.ascontiguousarray(mix.weights)
        if not combine(space.raw, kinds, cut.count, weights, space.rows, space.out, KINDS[dtype]):
            raise InputError(f"the merge of {printable(cut.name)} does not fit {dtype}", "give --dtype float32")
        for writer, row in zip(self.writers, space.out, strict=True):
            writer.write(cut.name, cut.first, item, row[: cut.count * item])

    def _sum(self, results: Iterable[tuple[Cut, Doubles]]) -> Doubles:
        """Exactly rounded sums over all blocks of a group, (1 + pairs,): first per tensor, then over the tensors."""
        tensors: dict[str, list[Doubles]] = {}
        totals: list[list[float]] = []
        for cut, products in results:
            tensors.setdefault(cut.name, []).append(products)
            tensor = self.plan.models[0].tensors[cut.name]
            if cut.first + cut.count == tensor.count:
                totals.append([fsum(column.tolist()) for column in np.concatenate(tensors.pop(cut.name)).T])
            self.task.advance(self._bytes(cut))
        if not totals:  # a group of empty tensors
            return np.zeros(1 + pair_count(self.vectors))
        return np.array([fsum(column) for column in zip(*totals, strict=True)])

    def _bytes(self, cut: Cut) -> int:
        return sum(cut.count * ITEM_BYTES[model.tensors[cut.name].dtype] for model in self.plan.operands)

    def _gram(self, sums: Doubles) -> Doubles:
        """The upper triangle in `sums[1:]` as a symmetric matrix (M, M)."""
        matrix = np.zeros((self.vectors, self.vectors))
        matrix[np.triu_indices(self.vectors)] = sums[1:]
        return matrix + np.triu(matrix, 1).T

    def _not_finite(self, cut: Cut, space: Workspace) -> InputError:
        """Names the input, the tensor and the element that is NaN or Inf."""
        for model, raw in zip(self.plan.operands, space.raw, strict=True):
            tensor = model.tensors[cut.name]
            values = np.empty(cut.count, np.float32)
            widen(raw[: cut.count * ITEM_BYTES[tensor.dtype]], KINDS[tensor.dtype], values)
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                return InputError(
                    f"{model}: {printable(cut.name)} holds {values[bad[0]]} at element {cut.first + int(bad[0])}",
                    "the model is broken; merge an earlier checkpoint",
                )
        return InputError(f"{printable(cut.name)}: the models differ by more than fp32 can hold", "check the models")


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 16
) -> Iterator[Result]:
    """`map` that keeps at most `ahead` calls waiting, so that memory does not grow with the model."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
