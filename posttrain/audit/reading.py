"""Files read from the disk, once each, several at a time: the digest of the bytes, and those of tensors and settings.

What the page cache holds of a file is dropped before the file is read: rot on the disk is invisible behind it. What it
did not hold before is dropped afterwards, so that a verify of 100 GB does not push everything else out of memory.
Each file is read ahead while its last piece is hashed. On systems without posix_fadvise the files are only read.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.digest_cache import Stamp, stamp_of, store
from gemma2.core.outputs.digests import INDEX, digest_of_tensors, indexed_tensors, tensor_line
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.outputs.model_identity import CONFIGS, digest_of_settings
from gemma2.core.outputs.safetensors_header import Tensor, read_header
from gemma2.core.progress import SILENT, Progress

__all__ = ["FileRead", "read_files", "store_model", "weights_of"]

PIECE = 1 << 20  # bytes read at a time: they stay in the processor's cache until they are hashed
WINDOW = 8 << 20  # bytes that are asked of the disk, and dropped, at once; two windows are on their way
DEFAULT_THREADS = min(8, os.cpu_count() or 1)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class FileRead:
    """What was read.

    digest    of the bytes; "" if they could not be read
    settings  digest of the settings, of a file that has some (core/outputs/model_identity.py)
    tensors   name -> line of the digest (core/outputs/digests.py); None if the file holds none that can be read
    problem   why it could not be read
    gone      whether it is not there
    stamp, began  of the file before it was read, and the time in ns
    """

    size: int = 0
    digest: str = ""
    settings: str = ""
    tensors: Mapping[str, str] | None = None
    problem: str = ""
    gone: bool = False
    stamp: Stamp = (0, 0, 0, 0)
    began: int = 0


def read_files(
    paths: Iterable[Path], threads: int = DEFAULT_THREADS, progress: Progress = SILENT
) -> dict[Path, FileRead]:
    """Read files from the disk and digest them. A file that cannot be read has a problem; one that is gone too.

    The digests are stored for later commands (core/outputs/digest_cache.py).
    """
    known: dict[tuple[int, int], list[Path]] = {}  # one file may have several names
    found: dict[Path, FileRead] = {}
    total = 0
    for path in dict.fromkeys(paths):
        try:
            status = path.stat()
        except OSError as error:
            found[path] = _unreadable(error)
            continue
        if not stat.S_ISREG(status.st_mode):
            found[path] = FileRead(problem="is not a regular file")
            continue
        names = known.setdefault((status.st_dev, status.st_ino), [])
        total += 0 if names else status.st_size
        names.append(path)
    order = sorted(known.values(), key=lambda names: -names[0].stat().st_size)
    inside = max(1, threads // max(1, len(order)))  # threads that hash one file
    stop = threading.Event()
    with progress.task("verify", total, "bytes") as task, ThreadPoolExecutor(max(1, threads)) as pool:
        advance = partial(_advance, task.advance, stop)
        jobs = {pool.submit(_read_file, names[0], inside, advance): names for names in order}
        try:
            for job in as_completed(jobs):
                read = job.result()
                found |= dict.fromkeys(jobs[job], read)
                _store_file(jobs[job][0], read)
        except BaseException:  # interrupted
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _unreadable(error: OSError) -> FileRead:
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return FileRead(problem=error.strerror or "cannot be read", gone=gone)


class _Stopped(Exception):
    """The command was interrupted."""


def _advance(advance: Callable[[float], None], stop: threading.Event, count: int) -> None:
    if stop.is_set():
        raise _Stopped
    advance(count)


def _read_file(path: Path, threads: int, advance: Advance) -> FileRead:
    began = time.time_ns()
    try:
        stamp = stamp_of(path)
        with path.open("rb", buffering=0) as file:
            pages = _Pages(file.fileno(), stamp[1])
            held = _tensors_of(path) if path.suffix == ".safetensors" else None
            tensors = None if held is None else _TensorDigests(held, threads)
            whole, size = hasher(threads), 0
            buffer = memoryview(bytearray(min(PIECE, stamp[1] + 1)))
            kept = bytearray()  # of a file with settings
            pages.at(0)
            while got := file.readinto(buffer):
                piece = buffer[:got]
                whole.update(piece)
                if tensors is not None:
                    tensors.update(size, piece)
                if path.name in CONFIGS:
                    kept += piece
                size += got
                pages.at(size)
                advance(got)
    except OSError as error:
        return _unreadable(error)
    settings = digest_of_settings(bytes(kept)) if path.name in CONFIGS else ""
    lines = tensors.lines() if tensors is not None else None
    return FileRead(size, digest_name(whole), settings, lines, stamp=stamp, began=began)


def _tensors_of(path: Path) -> list[Tensor] | None:
    try:
        return [*read_header(path).values()]
    except InputError:  # the digest of its bytes says that it is damaged
        return None


@dataclass
class _TensorDigests:
    """The digests of the tensors of one file, from its bytes in order."""

    tensors: Sequence[Tensor]
    threads: int
    found: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._next = 0
        self._running = hasher(self.threads)

    def update(self, position: int, piece: memoryview) -> None:
        """Take the bytes of the file from `position` on."""
        end = position + len(piece)
        while self._next < len(self.tensors):
            tensor = self.tensors[self._next]
            last = tensor.offset + tensor.nbytes
            begin, until = max(tensor.offset, position), min(last, end)
            if begin < until:
                self._running.update(piece[begin - position : until - position])
            if last > end:
                return
            self.found[tensor.name] = tensor_line(tensor, self._running.hexdigest())
            self._running = hasher(self.threads)
            self._next += 1

    def lines(self) -> dict[str, str] | None:
        """Return name -> line; None if the file ended before its tensors did."""
        return self.found if self._next == len(self.tensors) else None


class _Pages:
    """The pages of an open file in the page cache, in windows."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.advise = getattr(os, "posix_fadvise", None)
        self.asked = self.dropped = 0
        if self.advise is not None:
            self.before = {start for start in range(0, size, WINDOW) if self._holds(start)}
            self.advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _holds(self, position: int) -> bool:
        """Whether the cache holds the page at a position. False where the system cannot say."""
        flag = getattr(os, "RWF_NOWAIT", None)
        if flag is None:
            return False
        try:
            return os.preadv(self.descriptor, [bytearray(1)], position, flag) == 1
        except OSError:
            return False

    def at(self, position: int) -> None:
        """Ask for what is read next, and drop the windows before a position, unless they were there at the start."""
        if self.advise is None:
            return
        while self.asked < min(self.size, position + 2 * WINDOW):
            self.advise(self.descriptor, self.asked, WINDOW, os.POSIX_FADV_WILLNEED)
            self.asked += WINDOW
        end = position >= self.size
        while self.dropped + WINDOW <= position or (end and self.dropped < self.size):
            if self.dropped not in self.before:
                self.advise(self.descriptor, self.dropped, WINDOW, os.POSIX_FADV_DONTNEED)
            self.dropped += WINDOW


# --- what the reads say of models -------------------------------------------------------------------------------------


def weights_of(files: Sequence[Path], read: Mapping[Path, FileRead], index: Path) -> str:
    """Return the digest of the tensors of a model directory (`digest_weights`); "" if a file of them is broken."""
    try:
        indexed = indexed_tensors(index)
    except InputError:
        return ""
    lines: list[str] = []
    for path in files:
        tensors = read[path].tensors if path in read else None
        if tensors is None:
            return ""
        lines += [line for name, line in tensors.items() if indexed.get(name, path.name) == path.name]
    return digest_of_tensors(lines)


def store_model(directory: Path, files: Sequence[Path], read: Mapping[Path, FileRead], weights: str) -> None:
    """Store the digest of a model's tensors, found on the disk, over a remembered one."""
    paths = [*files, *([directory / INDEX] if (directory / INDEX).is_file() else [])]
    if weights and all(path in read for path in paths):
        began = min(read[path].began for path in paths)
        store("tensors", paths, [read[path].stamp for path in paths], began, weights)


def _store_file(path: Path, read: FileRead) -> None:
    if read.digest:
        store("file", [path], [read.stamp], read.began, read.digest)
    if read.settings:
        store("config", [path], [read.stamp], read.began, read.settings)
