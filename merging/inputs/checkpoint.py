"""Model directories on disk: their tensors, and reads of ranges. Only this module and `writer` open weight files.

Opening reads headers only. Reads are `preadv` into the caller's buffer, so that a file that shrinks while it is read
is an error and not a bus fault.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, read_json
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, Tensor, printable
from gemma2.merging.remote.arrivals import ON_DISK, Arrivals

from .low_rank import LowRank
from .weight_files import COMPANIONS, INDEX, WEIGHTS, find_weights, natural_order, stored_tensors, wrong_size

__all__ = ["COMPANIONS", "INDEX", "WEIGHTS", "Checkpoint", "Reader", "natural_order", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: its configuration and the place of each tensor.

    role     its name in messages
    path     the directory; of an adapted model that of the adapter
    origin   the directory of configuration and tokenizer; of an adapted model that of the model
    updates  low-rank updates of an adapted model, by tensor
    copies   stored copies of a tied embedding, dropped from its tensors, with the embedding
    doubts   what is wrong with its files and decides no value, as warnings
    has_own_head  its adapter separates the head from the embedding that its configuration ties it to
    """

    role: str
    path: Path
    config: JsonMapping
    tensors: Mapping[str, Tensor]
    origin: Path
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    copies: tuple[tuple[Tensor, Tensor], ...] = ()
    has_own_head: bool = False
    doubts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.role} {self.path}"

    @property
    def nbytes(self) -> int:
        """The size of all weights in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """The files that hold its weights, by name."""
        factors = {tensor.file for update in self.updates.values() for tensor in (update.a, update.b)}
        checked = {copy.file for copy, _ in self.copies}
        return sorted({tensor.file for tensor in self.tensors.values()} | factors | checked)


def open_checkpoint(path: Path, role: str, arrivals: Arrivals = ON_DISK) -> Checkpoint:
    """Read the configuration and every header of a model directory; no tensor data, which may not have arrived yet.

    Raises InputError if it is not a model directory, is unfinished, or stores weights in another format.
    """
    shards = find_weights(path, role, arrivals)
    tensors = stored_tensors(path, shards, arrivals)
    doubts = () if shards is None else wrong_size(path / INDEX, tensors)
    return Checkpoint(role, path, read_json(path / "config.json"), tensors, path, doubts=doubts)


class Reader:
    """Reads ranges of tensors. Safe to share between threads; made by `Reader.open`."""

    def __init__(self, descriptors: Mapping[Path, int], arrivals: Arrivals = ON_DISK) -> None:
        self._descriptors = descriptors
        self._arrivals = arrivals

    def wait(self, tensor: Tensor, first: int = 0, count: int | None = None) -> None:
        """Return when elements [first, first + count) of a tensor have arrived. `read` waits by itself."""
        item = ITEM_BYTES[tensor.dtype]
        begin = tensor.offset + first * item
        self._arrivals.wait(tensor.file, begin, begin + (tensor.count - first if count is None else count) * item)

    def descriptor(self, tensor: Tensor) -> int:
        """Return the descriptor of the open file that holds a tensor, for the compiled passes, which `wait` first."""
        return self._descriptors[tensor.file]

    @classmethod
    @contextmanager
    def open(cls, checkpoints: Iterable[Checkpoint], arrivals: Arrivals = ON_DISK) -> Iterator[Reader]:
        """Open every weight file of the checkpoints for the duration of the block."""
        with ExitStack() as stack:
            descriptors: dict[Path, int] = {}
            for file in {file for checkpoint in checkpoints for file in checkpoint.files}:
                descriptors[file] = os.open(arrivals.stored(file), os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptors[file])
            yield cls(descriptors, arrivals)

    def read(self, tensor: Tensor, first: int, count: int, into: NDArray[np.uint8]) -> None:
        """Read elements [first, first + count) of a tensor into the start of a byte buffer. Raises InputError."""
        self.wait(tensor, first, count)
        item = ITEM_BYTES[tensor.dtype]
        view = memoryview(into)[: count * item]  # type: ignore[arg-type]
        offset = tensor.offset + first * item
        while view:
            try:
                got = os.preadv(self._descriptors[tensor.file], [view], offset)
            except OSError as error:
                raise InputError(f"reading {tensor.file} failed ({error.strerror})", "check the disk") from error
            if got == 0:
                raise InputError(
                    f"{tensor.file} ended while {printable(tensor.name)} was read", "do not write to it during a merge"
                )
            view, offset = view[got:], offset + got

    def same(self, left: Tensor, right: Tensor, step: int = 1 << 20) -> bool:
        """Whether two tensors of one shape and dtype hold the same bytes."""
        ours, theirs = np.empty((2, step * ITEM_BYTES[left.dtype]), np.uint8)
        for first in range(0, left.count, step):
            count = min(step, left.count - first)
            self.read(left, first, count, ours)
            self.read(right, first, count, theirs)
            if not np.array_equal(ours[: count * ITEM_BYTES[left.dtype]], theirs[: count * ITEM_BYTES[left.dtype]]):
                return False
        return True
