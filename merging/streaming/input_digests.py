"""Digests of the tensors of a merge's inputs, from the reads of the merge itself: no byte is read for them again.

Tensors that the merge does not read whole and as they are (adapted or widened ones, rows of a table, copies that are
dropped) and those of the methods that read in their kernels are read here, in a separate thread, while the merge runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from gemma2.core.outputs.digests import WeightsDigest
from gemma2.core.outputs.safetensors_header import ITEM_BYTES
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.kernels.formats import Stored
from gemma2.merging.plan.groups import Source

__all__ = ["InputDigests"]


class InputDigests:
    """The digests of all inputs, by directory. Safe to share between threads."""

    def __init__(self, inputs: Iterable[Checkpoint]) -> None:
        self._models = {path: WeightsDigest(path) for path in dict.fromkeys(model.path for model in inputs)}

    def add(self, sources: Sequence[Source], first: int, count: int, stored: Stored) -> None:
        """Hash elements [first, first + count) of tensors, read as they are stored into rows (K, >= count)."""
        for source, row in zip(sources, stored, strict=True):
            data = memoryview(row[:count].view("u1"))  # type: ignore[arg-type]
            self._models[source.model.path].add(source.tensor, first * ITEM_BYTES[source.tensor.dtype], data)

    @contextmanager
    def read_ahead(self) -> Iterator[None]:
        """Read all inputs in a separate thread during the block, for methods that read in their kernels."""
        stopped = Event()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(lambda: [model.read(stopped) for model in self._models.values()])
            try:
                yield
            except BaseException:
                stopped.set()
                raise
            reading.result()

    def finish(self, threads: int) -> dict[Path, str]:
        """Read what did not pass by, and return the digest of each input's tensors."""
        return {path: model.finish(threads) for path, model in self._models.items()}
