"""Feeds ranges of tensors to the kernels: work space, jobs, adapted tensors, and the errors of failed reads.

A job is a range of one tensor. Operands that are all bf16 or all fp32 are read as they are; others (mixed, fp16,
adapted, read through a row map) are converted to fp32 here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import Gemma2Error, InputError
from gemma2.core.outputs.hashing import HASHED_BYTES
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable
from gemma2.merging.inputs.adapter import Factors, adapted_rows, load_factors
from gemma2.merging.inputs.checkpoint import Reader
from gemma2.merging.inputs.low_rank import LowRank
from gemma2.merging.kernels.dense import BLOCK
from gemma2.merging.kernels.dtypes import widen
from gemma2.merging.kernels.number_formats import KINDS, STORED, Bytes, Floats, Stored
from gemma2.merging.methods.method import Group
from gemma2.merging.plan.groups import Part, Source
from gemma2.merging.plan.merge_plan import MergePlan
from gemma2.merging.tokenizers.row_map import ZEROS, RowMap, gather

from .input_digests import InputDigests
from .writer import aligned

__all__ = [
    "CUT",
    "PIECE",
    "Block",
    "Feeder",
    "Loaded",
    "Workspace",
    "in_order",
    "job_length",
    "longest_cut",
    "row_length",
    "whole_rows",
]

CUT = 128 * 1024  # elements read, computed and written at a time: 1 MB with three bf16 operands, half of an L2 cache
# Elements of a job: writes of 4 MB past the page cache cost a fifth of the processor time of
# writes of 256 KB, and the third level cache holds what is read. Fewer where many operands and threads share the budget
# of elements in memory, but whole pieces of digests (of 2-byte elements) as long as that is not excessive.
LONGEST_JOB, SHORT_JOB, JOB_BUDGET, MOST_OPERANDS = 1 << 21, HASHED_BYTES // 2, 3 << 24, 32
WAITING = 2  # threads that wait for the disk while the others compute
PIECE = 64 * 1024  # elements that methods written in numpy see at a time, more where a row is longer
MOST_ALIGNED = 1 << 20  # elements: whole rows that fill whole BLOCKs only beyond it are cut without regard to BLOCK
WIDE_ROWS = 3  # rows that the sparse kernels need in addition to those of the operands

Item = TypeVar("Item")
Result = TypeVar("Result")


def row_length(shape: Sequence[int]) -> int:
    """Return the number of columns of a matrix; a vector is one row."""
    return max(int(shape[-1]), 1) if shape else 1


def longest_cut(plan: MergePlan, cut: int) -> int:
    """Return a cut with room for whole rows of every tensor if the method looks at rows, else `cut`."""
    method = plan.method
    by_rows = method.fused is not None and method.fused.kind == "arcee"
    if method.elements is None and not by_rows and (method.selection is None or method.selection.by != "rank"):
        return cut
    cut = max(cut, PIECE) if method.elements else cut
    rows = {row_length(shape) for _, shape in plan.layout.values()}
    return max(cut, *(-(-whole_rows(row, cut) // BLOCK) * BLOCK for row in rows))


def job_length(plan: MergePlan, outputs: int) -> int:
    """Return the elements of a job: a power of two."""
    rows = outputs + max((len(part.sources) for part in plan.parts.values()), default=1)
    share = JOB_BUDGET // (rows * workers_for(plan.request.threads))
    longest = min(1 << max(share.bit_length() - 1, 0), LONGEST_JOB)
    return max(longest, SHORT_JOB if rows <= MOST_OPERANDS else CUT)


def workers_for(threads: int) -> int:
    """Return the threads of a merge that computes with `threads`: some wait for the disk meanwhile."""
    return threads + WAITING if threads > 1 else 1


def whole_rows(row: int, cut: int) -> int:
    """Return the elements of as many whole rows as fit into a cut, at least one; if possible a multiple of BLOCK."""
    unit = lcm(row, BLOCK)
    if unit > MOST_ALIGNED:
        unit = row
    return max(cut // unit, 1) * unit


@dataclass(frozen=True)
class Block:
    """Elements [first, first + count) of one tensor of the output."""

    name: str
    part: Part
    first: int
    count: int


class Workspace:
    """The buffers of one job: operands, results, and fp32 rows of one block."""

    def __init__(self, operands: int, outputs: int, cut: int) -> None:
        self.raw: Bytes = np.empty((operands, cut * 4), np.uint8)
        self.rows: Floats = np.empty((operands + WIDE_ROWS, BLOCK), np.float32)
        self.out: Bytes = aligned((outputs, cut * 4))


@dataclass(frozen=True)
class Loaded:
    """The operands of a job: descriptor and offset of each, (K, 2), and their rows in the work space.

    stored  (K, >= cut) uint16 bits of bf16, or fp32
    """

    files: NDArray[np.int64]
    stored: Stored


class Feeder:
    """Work space and sources of one merge.

    cut      elements read at a time, a multiple of BLOCK
    workers  threads that use the work space
    digests  of the inputs; None if they are not read through `load`
    """

    def __init__(
        self,
        plan: MergePlan,
        reader: Reader,
        outputs: int,
        cut: int = CUT,
        digests: InputDigests | None = None,
    ) -> None:
        self.plan = plan
        self.reader = reader
        self.digests = digests
        self.workers = workers_for(plan.request.threads)
        operands = max((len(part.sources) for part in plan.parts.values()), default=1)
        largest = max((part.sources[0].count for part in plan.parts.values()), default=1)
        self.size = min(cut, max(-(-largest // BLOCK), 1) * BLOCK)
        self._free: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(self.workers):
            self._free.put(Workspace(operands, outputs, self.size))
        self._factors = lru_cache(maxsize=4 * operands)(self._load_factors)

    def jobs(self, group: Group) -> Iterator[Block]:
        """Yield the ranges of a group's tensors, in order."""
        for name in group.tensors:
            part = self.plan.parts[name]
            count = part.sources[0].count
            for first in range(0, count, self.size):
                yield Block(name, part, first, min(self.size, count - first))

    def load(self, job: Block, space: Workspace, first_time: bool) -> Stored:
        """Read the operands of a job of one cut into the work space, (K, >= count): as stored, or converted to fp32.

        first_time  whether no job has read these bytes before: they are hashed too
        """
        dtype = self._common_dtype(job.part)
        raw = space.raw[: len(job.part.sources)]
        if dtype is None:
            return self._converted(job, raw)
        step = HASHED_BYTES // ITEM_BYTES[dtype]
        for begin in range(0, job.count, step):  # hashed while they are in the second level cache
            count = min(step, job.count - begin)
            for source, row in zip(job.part.sources, raw, strict=True):
                data = row[begin * ITEM_BYTES[dtype] : (begin + count) * ITEM_BYTES[dtype]]
                self.reader.read(source.tensor, job.first + begin, count, data)
                if first_time and self.digests is not None:
                    self.digests.add(source, job.first + begin, data)
        return raw.view(STORED[dtype])

    def _converted(self, job: Block, raw: Bytes) -> Floats:
        stored = raw.view(np.float32)
        for source, row in zip(job.part.sources, stored, strict=True):
            self._form(source, job.first, row[: job.count])
        return stored

    @contextmanager
    def space(self) -> Iterator[Workspace]:
        """Lend the buffers of one thread for the duration of the block."""
        space = self._free.get()
        try:
            yield space
        finally:
            self._free.put(space)

    def sources(self, job: Block, space: Workspace) -> Loaded:
        """Return the operands for the compiled passes: in their files if all have one dtype, else converted to fp32."""
        dtype = self._common_dtype(job.part)
        raw = space.raw[: len(job.part.sources)]
        if dtype is not None:
            for source in job.part.sources:
                self.reader.wait(source.tensor, job.first, job.count)
            files = [(self.reader.descriptor(source.tensor), source.tensor.offset) for source in job.part.sources]
            return Loaded(np.array(files, np.int64), raw.view(STORED[dtype]))
        return Loaded(np.full((len(raw), 2), -1, np.int64), self._converted(job, raw))

    def values(self, job: Block) -> Floats:
        """Return all operands of a job as fp32, (K, count). Raises InputError if one is not finite."""
        rows = np.empty((len(job.part.sources), job.count), np.float32)
        for source, row in zip(job.part.sources, rows, strict=True):
            self._form(source, job.first, row)
        if not np.isfinite(rows).all():
            raise self.not_finite(job)
        return rows

    def _common_dtype(self, part: Part) -> str | None:
        """Return the dtype of all operands, if it is one that the kernels read directly; else None."""
        dtypes = {source.tensor.dtype for source in part.sources}
        plain = len(dtypes) == 1 and not any(source.update or source.rows for source in part.sources)
        return dtypes.pop() if plain and dtypes <= {"BF16", "F32"} else None

    def _form(self, source: Source, first: int, into: Floats) -> None:
        """Fill `into` with the elements from `first` on as fp32, W or W + scale B A, from the inputs that hold them."""
        if source.rows is not None and self._gathered(source, source.rows, first, into):
            return
        done = 0
        for piece, begin, count in source.pieces(first, into.size):
            block = into[done : done + count]
            done += count
            if piece is None:
                block[:] = 0
                continue
            tensor = piece.tensor
            stored = np.empty(count * ITEM_BYTES[tensor.dtype], np.uint8)
            self.reader.read(tensor, begin, count, stored)
            widen(stored, KINDS[tensor.dtype], block)
            if piece.update is not None:
                adapted_rows(block, self._factors(piece.update), begin)

    def _gathered(self, source: Source, rows: RowMap, first: int, into: Floats) -> bool:
        """`_form` in one call for many short spans. False if they differ in dtype, are adapted or could not be read."""
        parts = [Source(model, source.name) for model in rows.inputs]
        tensors = [part.tensor for part in parts]
        if any(part.update for part in parts) or len({tensor.dtype for tensor in tensors}) > 1:
            return False
        for tensor in tensors:
            self.reader.wait(tensor)
        item = ITEM_BYTES[tensors[0].dtype]
        files = np.array([(self.reader.descriptor(tensor), tensor.offset) for tensor in tensors], np.int64)
        models, begins, counts = rows.spans(first, into.size, prod(source.tensor.shape[1:]))
        descriptors = np.where(models == ZEROS, -1, files[models, 0])
        places = np.column_stack([descriptors, files[models, 1] + begins * item, counts * item])
        stored = np.empty(into.size * item, np.uint8)
        if not gather(places, stored):
            return False
        widen(stored, KINDS[tensors[0].dtype], into)
        return True

    def _load_factors(self, update: LowRank) -> Factors:
        return load_factors(self.reader, update)

    def job_bytes(self, job: Block) -> int:
        """Return the bytes of a job in all operands."""
        return sum(job.count * ITEM_BYTES[source.tensor.dtype] for source in job.part.sources)

    def unreadable(self, job: Block, operand: int) -> Gemma2Error:
        """Return the reason why a compiled read failed: it is repeated in Python, which reports the system's."""
        tensor = job.part.sources[operand].tensor
        try:
            for first in range(job.first, job.first + job.count, self.size):
                count = min(self.size, job.first + job.count - first)
                self.reader.read(tensor, first, count, np.empty(count * 4, np.uint8))
        except Gemma2Error as error:
            return error
        return InputError(f"reading {tensor.file} failed once", "check the disk, and merge again")

    def not_finite(self, job: Block) -> InputError:
        """Return an error that names the input, the tensor and the element that is NaN or Inf."""
        for source in job.part.sources:
            for first in range(job.first, job.first + job.count, self.size):
                count = min(self.size, job.first + job.count - first)
                values = np.empty(count, np.float32)
                self._form(source, first, values)
                bad = np.flatnonzero(~np.isfinite(values))
                piece, element, _ = next(source.pieces(first + int(bad[0]), 1)) if bad.size else (None, 0, 0)
                if piece is not None:
                    return InputError(
                        f"{piece.model}: {printable(piece.name)} holds {values[bad[0]]} at element {element}",
                        "the model is broken; merge an earlier checkpoint",
                    )
        return InputError(f"{printable(job.name)}: the difference of the models overflows fp32", "check the models")


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 8
) -> Iterator[Result]:
    """`map` with at most `ahead` calls waiting, so that memory does not grow with the model."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
