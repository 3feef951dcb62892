"""Files read from the disk, once each, several at a time: the digest of the bytes, and those of tensors and settings.

The page cache is passed by (O_DIRECT): rot on the disk is invisible behind it, a verify of 100 GB would push everything
else out of memory, and filling it costs as much time as the digests. While a piece is hashed the next one is read.
Where a file system has no O_DIRECT, what the cache holds of a file is dropped before it is read, and again afterwards.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.digest_cache import Stamp, stamp_of, store
from gemma2.core.outputs.digests import INDEX, digest_of_tensors, indexed_tensors, tensor_line
from gemma2.core.outputs.hashing import TensorHasher, digest_name, hasher
from gemma2.core.outputs.model_identity import BY_VALUE, CONFIGS, settings_in
from gemma2.core.outputs.safetensors_header import Tensor, read_header
from gemma2.core.progress import SILENT, Progress

__all__ = ["FileRead", "read_files", "store_model", "weights_of"]

PIECE = 1 << 20  # bytes read at a time: they are hashed while the processor has them in its cache
AHEAD = 2  # pieces that are on their way while one is hashed
SMALL = 256 << 10  # a file of fewer bytes is read at once
BROKEN = "unreadable"  # in the place of a digest of tensors: no model has it
DEFAULT_THREADS = max(4, min(8, os.cpu_count() or 1))  # files at once: the disk is to be busy while others are hashed

Advance = Callable[[int], None]


@dataclass(frozen=True)
class FileRead:
    """What was read.

    digest    of the bytes; "" if they could not be read
    settings  digest of the settings, of a file that has some (core/outputs/model_identity.py)
    tensors   name -> line of the digest (core/outputs/digests.py); None if they were not asked for, or cannot be read
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
    paths: Iterable[Path],
    threads: int = DEFAULT_THREADS,
    progress: Progress = SILENT,
    with_tensors: Collection[Path] = (),
) -> dict[Path, FileRead]:
    """Read files from the disk and digest them. A file that cannot be read has a problem; one that is gone too.

    with_tensors  those of the files whose tensors are digested as well, which takes as long again

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
    wanted, stop = {*with_tensors}, threading.Event()
    with progress.task("verify", total, "bytes") as task, ThreadPoolExecutor(max(1, threads)) as pool:
        advance = partial(_advance, task.advance, stop)
        inner = {names[0] for names in order if not wanted.isdisjoint(names)}
        jobs = {pool.submit(_read_file, names[0], inside, advance, names[0] in inner): names for names in order}
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


def _read_file(path: Path, threads: int, advance: Advance, with_tensors: bool) -> FileRead:
    began = time.time_ns()
    try:
        stamp = stamp_of(path)
        held = _tensors_of(path) if with_tensors else None
        tensors = None if held is None else _TensorDigests(held)
        whole, size = hasher(threads), 0
        kept = bytearray()  # of a file with settings
        with closing(_pieces(path, stamp[1])) as pieces:
            for piece in pieces:
                whole.update(piece)
                if tensors is not None:
                    tensors.update(size, piece)
                if path.name in CONFIGS:
                    kept += piece
                size += len(piece)
                advance(len(piece))
    except OSError as error:
        return _unreadable(error)
    settings = settings_in(bytes(kept)) if path.name in CONFIGS else ""
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
    found: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._next = 0
        self._running = TensorHasher()

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
            self._running = TensorHasher()
            self._next += 1

    def lines(self) -> dict[str, str] | None:
        """Return name -> line; None if the file ended before its tensors did."""
        return self.found if self._next == len(self.tensors) else None


# --- from the disk ----------------------------------------------------------------------------------------------------


def _pieces(path: Path, size: int) -> Generator[memoryview]:
    """Yield the bytes of a file from the disk; the next pieces are read while one is used. A piece is used once."""
    with ExitStack() as stack:
        source = _Source(path, stack, direct=size >= SMALL)
        if size < SMALL:
            yield memoryview(source.read(bytearray(size), 0))
            return
        free = [_buffer() for _ in range(min(AHEAD, -(-size // PIECE)) + 1)]
        reader = stack.enter_context(ThreadPoolExecutor(AHEAD))
        coming: deque[tuple[mmap.mmap, Future[memoryview]]] = deque()
        for position in range(0, size, PIECE):
            buffer = free.pop()
            coming.append((buffer, reader.submit(source.read, buffer, position)))
            if not free:
                yield from _first(coming, free)
        while coming:
            yield from _first(coming, free)


def _buffer() -> mmap.mmap:
    """Memory for a piece, aligned as O_DIRECT wants it, of large pages: the disk then takes larger requests."""
    buffer = mmap.mmap(-1, PIECE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _first(coming: deque[tuple[mmap.mmap, Future[memoryview]]], free: list[mmap.mmap]) -> Iterator[memoryview]:
    buffer, piece = coming.popleft()
    yield piece.result()
    free.append(buffer)


class _Source:
    """An open file, past the page cache where that is possible."""

    def __init__(self, path: Path, stack: ExitStack, direct: bool) -> None:
        self.path, self.stack = path, stack
        self.lock = threading.Lock()
        self.plain: FileIO | None = None
        self.direct: FileIO | None = None
        flag = getattr(os, "O_DIRECT", 0)
        if flag and direct:
            try:
                self.direct = self._open(flag)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        if self.direct is None:
            self._through_the_cache()

    def read(self, buffer: bytearray | mmap.mmap, position: int) -> memoryview:
        """Read the bytes from a position on into a buffer; returns what there is, at most its length."""
        view, got = memoryview(buffer), 0
        if self.direct is not None:
            try:
                got = os.preadv(self.direct.fileno(), [view], position)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system that takes the flag and not the read
                    raise
        # The end of a file, or of what was read at once: what follows may not begin with a block.
        while got < len(view) and (more := os.preadv(self._through_the_cache().fileno(), [view[got:]], position + got)):
            got += more
        return view[:got]

    def _open(self, flag: int) -> FileIO:
        return self.stack.enter_context(FileIO(self.path, opener=lambda name, flags: os.open(name, flags | flag)))

    def _through_the_cache(self) -> FileIO:
        """The file, without what the page cache holds of it, now and at the end."""
        with self.lock:
            if self.plain is None:
                self.plain = self._open(0)
                if hasattr(os, "posix_fadvise"):
                    drop = partial(os.posix_fadvise, self.plain.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    drop()
                    self.stack.callback(drop)
            return self.plain


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
    """Store the digest of a model's tensors, found on the disk, over a remembered one; also that it has none."""
    paths = [*files, *([directory / INDEX] if (directory / INDEX).is_file() else [])]
    if files and all(path in read and read[path].digest for path in paths):
        began = min(read[path].began for path in paths)
        store("tensors", paths, [read[path].stamp for path in paths], began, weights or BROKEN)


def _store_file(path: Path, read: FileRead) -> None:
    if read.digest:
        store("file", [path], [read.stamp], read.began, read.digest)
    if read.settings and read.size > BY_VALUE:
        store("config", [path], [read.stamp], read.began, read.settings)
