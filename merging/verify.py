"""Reads an output back as it is on the disk: header, check sums, and the digests that its manifest records.

One pass: a page-sized reader that bypasses the page cache where the writer did, BLAKE3 over the file in order, and the
check sums of the tensors, which must be those of what was computed. Values were found finite when they were computed,
so equal bytes are finite as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import open_checkpoint
from .errors import OutputError
from .formats import Bytes
from .header import PAGE_BYTES, Tensor, printable, read_header
from .kernels import check_sum
from .outputs import digest_name, hasher, weight_files
from .progress import Task
from .writer import DIRECT_BYTES, Layout, aligned, open_direct

__all__ = ["verify_output"]

PIECE = 8 << 20  # bytes read, hashed and checked at a time


def verify_output(
    directory: Path, layout: Layout, checks: Mapping[str, int], threads: int, task: Task
) -> dict[str, str]:
    """Compare a finished output with its plan and its check sums; the digest of each weight file.

    checks  of each tensor, as `kernels.check_sum` defines them
    Raises OutputError naming what differs.
    """
    written = {name: (t.dtype, t.shape) for name, t in open_checkpoint(directory, "output").tensors.items()}
    if written != dict(layout):
        raise OutputError(f"{directory} does not read back as it was written", "check the disk, and merge again")
    files = weight_files(directory)
    direct = sum(file.stat().st_size for file in files) >= DIRECT_BYTES
    return {file.name: _verify_file(file, checks, threads, direct, task) for file in files}


def _verify_file(path: Path, checks: Mapping[str, int], threads: int, direct: bool, task: Task) -> str:
    tensors = list(read_header(path).values())
    sums = dict.fromkeys((tensor.name for tensor in tensors), 0)
    digest = hasher(threads)
    position = 0
    with _pieces(path, direct) as pieces:
        for piece in pieces:
            digest.update(memoryview(piece))  # type: ignore[arg-type]
            _add_checks(tensors, piece, position, sums)
            position += piece.size
            task.advance(piece.size)
    for name, found in sums.items():
        if found != checks.get(name, 0):  # nothing was written of an empty tensor
            raise OutputError(
                f"{path}: {printable(name)} reads back with check sum {found:08x}, not {checks.get(name, 0):08x}",
                "check the disk and the memory, and merge again",
            )
    return digest_name(digest)


@contextmanager
def _pieces(path: Path, direct: bool) -> Iterator[Iterator[Bytes]]:
    """A file in order, PIECE bytes at a time; each is valid until the next is taken. One is read ahead."""
    size = path.stat().st_size
    bypass = open_direct(path, os.O_RDONLY) if direct else None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if bypass is None else bypass
    buffers = aligned((2, PIECE))

    def read(number: int) -> Bytes:
        into = buffers[number % 2]
        begin = number * PIECE
        wanted = min(PIECE, size - begin)
        # Past the cache only whole pages are read; the file ends where it ends.
        room = into[: -(-wanted // PAGE_BYTES) * PAGE_BYTES]
        done = 0
        while done < wanted:
            got = os.preadv(descriptor, [memoryview(room)[done:]], begin + done)
            if got == 0:
                raise OutputError(f"{path} ended while it was read back", "check the disk, and merge again")
            done += got
        return into[:wanted]

    def pieces() -> Iterator[Bytes]:
        with ThreadPoolExecutor(1) as reader:
            count = -(-size // PIECE)
            ahead = reader.submit(read, 0)
            for number in range(count):
                piece = ahead.result()
                if number + 1 < count:
                    ahead = reader.submit(read, number + 1)
                yield piece

    try:
        yield pieces()
    except OSError as error:
        raise OutputError(
            f"reading {path} back failed ({error.strerror})", "check the disk, and merge again"
        ) from error
    finally:
        os.close(descriptor)


def _add_checks(tensors: Sequence[Tensor], piece: Bytes, position: int, sums: dict[str, int]) -> None:
    """Add what a piece of the file, from `position` on, holds of each tensor."""
    end = position + piece.size
    for tensor in tensors:
        low, high = max(tensor.offset, position), min(tensor.offset + tensor.nbytes, end)
        if low < high:
            part = piece[low - position : high - position]
            sums[tensor.name] = (sums[tensor.name] + int(check_sum(part, (low - tensor.offset) // 2))) % 2**32
