"""Squared norms of two models, of their difference and of their task vectors: one streamed pass, two or more threads.

Differences and sums are fp64, over cuts that do not depend on the number of threads: any number gives the same bits.
Memory holds one cut per thread and model, and the factors of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import fsum
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable
from gemma2.merging.inputs.adapter import adapted_rows, load_factors
from gemma2.merging.inputs.checkpoint import Checkpoint, Reader
from gemma2.merging.kernels.dtypes import widen
from gemma2.merging.kernels.native import compiled
from gemma2.merging.kernels.number_formats import KINDS, Floats

__all__ = ["Distances", "Sums"]

CUT = 1 << 18  # elements that a thread reads at a time
BLOCK = 4096  # elements that are widened at a time: they stay in the first level cache

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Squared norms over one tensor, fp64: of a, b, b - a, base, a - base, b - base (the last three 0 without base)."""

    parameters: int
    squares: tuple[float, ...]
    largest: float


class Distances:
    """One pass over the weights: threads read cuts of all operands (a, b, base) and sum them."""

    def __init__(self, models: Sequence[Checkpoint], reader: Reader, threads: int) -> None:
        self.models, self.reader, self.threads = models, reader, threads
        self._factors = lru_cache(maxsize=2 * len(models))(lambda update: load_factors(reader, update))
        self._free: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
        for _ in range(threads):
            self._free.put(np.empty((len(models), CUT * 4), np.uint8))

    def run(self, names: Iterable[str]) -> Iterator[tuple[str, Sums]]:
        """Yield the sums of each tensor."""
        with ThreadPoolExecutor(self.threads) as pool:
            for name in names:
                count = self.models[0].tensors[name].count
                parts = list(pool.map(lambda first, of=name: self._measure(of, first), range(0, count, CUT)))
                parts = parts or [np.zeros(7)]
                squares = tuple(fsum(column) for column in zip(*(part[:6].tolist() for part in parts), strict=True))
                yield name, Sums(count, squares, float(max(part[6] for part in parts)))

    def _measure(self, name: str, first: int) -> Doubles:
        """Return the six sums and the largest difference of one cut, (7,)."""
        raw = self._free.get()
        try:
            count = min(CUT, self.models[0].tensors[name].count - first)
            kinds = [self._load(model, name, first, row, count) for model, row in zip(self.models, raw, strict=True)]
            out = np.zeros(7)
            _measure(raw, np.array(kinds), count, out)
        finally:
            self._free.put(raw)
        if not np.isfinite(out).all():
            at = next((i for i, column in enumerate((0, 1, 3)) if not np.isfinite(out[column])), 0)
            raise InputError(
                f"{self.models[at]}: {printable(name)} holds NaN or Inf in elements {first} to {first + count - 1}",
                "the model is broken; compare an earlier checkpoint",
            )
        return out

    def _load(self, model: Checkpoint, name: str, first: int, row: NDArray[np.uint8], count: int) -> int:
        """Read one cut of one operand into the start of a row, plus an adapter's update; return its encoding."""
        tensor, update = model.tensors[name], model.updates.get(name)
        self.reader.read(tensor, first, count, row)
        if update is None:
            return KINDS[tensor.dtype]
        values = np.empty(count, np.float32)
        widen(row[: count * ITEM_BYTES[tensor.dtype]], KINDS[tensor.dtype], values)
        adapted_rows(values, self._factors(update), first)
        row[: count * 4] = values.view(np.uint8)
        return KINDS["F32"]


@compiled()
def _measure(raw: NDArray[np.uint8], kinds: NDArray[np.int64], count: int, out: Doubles) -> None:
    """Add the squares of a, b, b - a, base, a - base, b - base to `out` (7,), whose last is the largest |b - a|.

    raw  (2 or 3, >= count * item) uint8: a, b and the base, encoded by `kinds`
    """
    rows = np.empty((kinds.size, BLOCK), np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        for k in range(kinds.size):
            item = 4 if kinds[k] == 2 else 2
            widen(raw[k, start * item : (start + size) * item], kinds[k], rows[k, :size])
        a, b = rows[0, :size], rows[1, :size]
        out[0] += _square(a)
        out[1] += _square(b)
        out[2] += _distance(a, b)
        out[6] = max(out[6], _largest(a, b))
        if kinds.size == 3:
            base = rows[2, :size]
            out[3] += _square(base)
            out[4] += _distance(base, a)
            out[5] += _distance(base, b)


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _square(x: Floats) -> np.float64:
    """Return |x|^2 of one block in fp64."""
    total = np.float64(0)
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _distance(x: Floats, y: Floats) -> np.float64:
    """Return |y - x|^2 of one block in fp64."""
    total = np.float64(0)
    for i in range(x.size):
        step = np.float64(y[i]) - np.float64(x[i])
        total += step * step
    return total


@compiled(fastmath={"reassoc", "nsz", "nnan"})  # a NaN is noticed in the sums
def _largest(x: Floats, y: Floats) -> np.float64:
    """Return max |y - x| of one block."""
    largest = np.float64(0)
    for i in range(x.size):
        step = abs(np.float64(y[i]) - np.float64(x[i]))
        largest = step if step > largest else largest
    return largest
