"""Digests of the tensors of a merge's inputs, from the reads of the merge itself: no byte is read for them again.

Tensors that the merge does not read whole and as they are (adapted or widened ones, rows of a table, copies that are
dropped) and those of the methods that read in their kernels are read here, in a separate thread, while the merge runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from gemma2.core.outputs.digests import WeightsDigest
from gemma2.core.outputs.safetensors_header import ITEM_BYTES
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.kernels.number_formats import Bytes
from gemma2.merging.plan.groups import Source

__all__ = ["InputDigests"]


class InputDigests:
    """The digests of inputs that are on this disk, by directory. Safe to share between threads."""

    def __init__(self, inputs: Iterable[Checkpoint]) -> None:
        self._models = {path: WeightsDigest(path) for path in dict.fromkeys(model.path for model in inputs)}

    def add(self, source: Source, first: int, data: Bytes) -> None:
        """Hash the elements of a tensor from `first` on, as they are stored."""
        model = self._models.get(source.model.path)
        if model is not None:
            model.add(source.tensor, first * ITEM_BYTES[source.tensor.dtype], memoryview(data))  # type: ignore[arg-type]

    @contextmanager
    def read_ahead(self) -> Iterator[None]:
        """Read all inputs in a separate thread during the block, for methods that read in their kernels."""
        stopped = Event()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(self._read, stopped)
            try:
                yield
            except BaseException:
                stopped.set()
                raise
            reading.result()

    def _read(self, stopped: Event) -> None:
        for model in self._models.values():
            model.read(stopped)

    def finish(self, threads: int) -> dict[Path, str]:
        """Read what did not pass by, and return the digest of each input's tensors."""
        return {path: model.finish(threads) for path, model in self._models.items()}
