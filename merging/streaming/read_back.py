"""Reads an output back from the disk: header, check sums, and the digests that its manifest records.

A reader follows the writer through each file in a separate thread, bypassing the page cache where the writer did: it
computes BLAKE3 over the file in order, and the check sums of the tensors, which must equal those of the computed data.
Values were checked to be finite when they were computed, so equal bytes are finite as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from types import TracebackType

from gemma2.core.errors import OutputError
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.outputs.safetensors_header import PAGE_BYTES, Tensor, printable, read_header, weight_files
from gemma2.core.progress import Task
from gemma2.merging.inputs.checkpoint import open_checkpoint
from gemma2.merging.kernels.dense import check_sum
from gemma2.merging.kernels.dtypes import Bytes

from .writer import DIRECT_BYTES, Layout, aligned, open_direct

__all__ = ["ReadBack"]

PIECE = 4 << 20  # bytes read, hashed and checked at a time


class VerifyStopped(Exception):
    """The merge failed, so its follower ends."""


class ReadBack:
    """Follows the writing of one output. A context manager: an exception in its block ends the follower.

    The files must have been allocated, with their headers.
    """

    def __init__(self, directory: Path, task: Task) -> None:
        self._directory = directory
        self._task = task
        self._sums: dict[str, int] = {}
        self._written: set[str] = set()
        self._stopped = False
        self._news = Condition()
        # One thread goes through the files, the other reads ahead for it.
        self._pool = ThreadPoolExecutor(2)
        self._digests: Future[dict[str, str]]

    def __enter__(self) -> ReadBack:
        try:
            self._digests = self._pool.submit(self._follow)
        except BaseException:  # an interrupt while the thread starts: it would wait for ever
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        with self._news:
            self._stopped = True
            self._news.notify_all()
        self._pool.shutdown()

    def wrote(self, names: Iterable[str]) -> None:
        """Announce tensors that are complete."""
        with self._news:
            self._written |= set(names)
            self._news.notify_all()

    def finish(self, layout: Layout, checks: Mapping[str, int]) -> dict[str, str]:
        """Compare the completely written output with its plan; return the digest of each weight file.

        checks  of each tensor, see `dense.check_sum`
        Raises OutputError naming the difference.
        """
        written = {name: (t.dtype, t.shape) for name, t in open_checkpoint(self._directory, "output").tensors.items()}
        if written != dict(layout):
            raise OutputError(
                f"{self._directory} reads back with other tensors than were written", "check the disk, and merge again"
            )
        self.wrote(layout)  # tensors without elements too
        digests = self._digests.result()
        for name, found in self._sums.items():
            if found != checks.get(name, 0):  # nothing was written of an empty tensor
                raise OutputError(
                    f"{self._directory}: {printable(name)} reads back with check sum {found:016x}, "
                    f"not {checks.get(name, 0):016x}",
                    "check the disk and the memory, and merge again",
                )
        return digests

    def _follow(self) -> dict[str, str]:
        files = weight_files(self._directory)
        direct = sum(file.stat().st_size for file in files) >= DIRECT_BYTES
        return {file.name: self._digest(file, direct) for file in files}

    def _digest(self, path: Path, direct: bool) -> str:
        """Return the digest of one file; add up the check sums of its tensors."""
        tensors = list(read_header(path).values())
        self._sums |= dict.fromkeys((tensor.name for tensor in tensors), 0)
        digest = hasher()  # one thread: it keeps up with the writers, which need the others
        position = 0
        with self._pieces(path, tensors, direct) as pieces:
            for piece in pieces:
                digest.update(memoryview(piece))  # type: ignore[arg-type]
                for tensor, low, high in overlaps(tensors, position, position + piece.size):
                    part = piece[low - position : high - position]
                    sums = self._sums[tensor.name] + int(check_sum(part, low))
                    self._sums[tensor.name] = sums % 2**64
                position += piece.size
                self._task.advance(piece.size)
        return digest_name(digest)

    @contextmanager
    def _pieces(self, path: Path, tensors: list[Tensor], direct: bool) -> Iterator[Iterator[Bytes]]:
        """Read a file in order as it is written, PIECE bytes at a time; a piece is valid until the next is taken."""
        size = path.stat().st_size
        bypass = open_direct(path, os.O_RDONLY) if direct else None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if bypass is None else bypass
        buffers = aligned((2, PIECE))

        def read(number: int) -> Bytes:
            begin = number * PIECE
            wanted = min(PIECE, size - begin)
            self._wait({tensor.name for tensor, _, _ in overlaps(tensors, begin, begin + wanted)})
            buffer: Bytes = buffers[number % 2]
            read_piece(descriptor, begin, wanted, buffer, path)
            return buffer[:wanted]

        def pieces() -> Iterator[Bytes]:
            count = -(-size // PIECE)
            ahead = self._pool.submit(read, 0)
            for number in range(count):
                piece = ahead.result()
                if number + 1 < count:
                    ahead = self._pool.submit(read, number + 1)
                yield piece

        try:
            yield pieces()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"reading {path} back failed ({error.strerror})", "check the disk, and merge again"
            ) from error
        finally:
            os.close(descriptor)

    def _wait(self, names: set[str]) -> None:
        """Wait until these tensors are written. Raises VerifyStopped if the merge failed."""
        with self._news:
            self._news.wait_for(lambda: self._stopped or names <= self._written)
            if self._stopped:
                raise VerifyStopped


def overlaps(tensors: Iterable[Tensor], begin: int, end: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the tensors that have bytes in [begin, end) of their file, and the range of these bytes."""
    for tensor in tensors:
        low, high = max(tensor.offset, begin), min(tensor.offset + tensor.nbytes, end)
        if low < high:
            yield tensor, low, high


def read_piece(descriptor: int, begin: int, wanted: int, into: Bytes, path: Path) -> None:
    """Read bytes [begin, begin + wanted) of a file; in whole pages, as reads past the page cache require."""
    room = memoryview(into[: -(-wanted // PAGE_BYTES) * PAGE_BYTES])  # type: ignore[arg-type]
    done = 0
    while done < wanted:
        got = os.preadv(descriptor, [room[done:]], begin + done)
        if got == 0:
            raise OutputError(f"{path} ended while it was read back", "check the disk, and merge again")
        done += got
