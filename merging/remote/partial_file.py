"""A weight file of the hub's cache while it arrives: sparse, of its full size, with a list of what has arrived.

    blobs/ETAG.gemma2.incomplete           the bytes that have arrived, at their places
    blobs/ETAG.gemma2.incomplete.ranges    the size, then one line FIRST END per range that has arrived

The library of the hub never reads these names. The file becomes blobs/ETAG, and a link in the snapshot, in one rename
after its digest was checked: SHA-256 for files in large file storage, git's SHA-1 for others. A process that is killed
leaves both files, and the next one fetches what is missing; a range that was listed but lost is found by the digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from gemma2.core.errors import InputError, OutputError

from .ranges import Ranges

__all__ = ["PartialFile", "RemoteFile"]

SUFFIX, JOURNAL = ".gemma2.incomplete", ".ranges"
SHA256, GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """A weight file on the hub, at one commit.

    owner  role and name of its model, for messages
    path   its place in the snapshot
    """

    owner: str
    repo: str
    commit: str
    name: str
    path: Path
    etag: str
    size: int

    def __str__(self) -> str:
        return f"{self.owner}: {self.name}"

    @property
    def blob(self) -> Path:
        """Its place in the cache, which files of the same content share."""
        return self.path.parents[len(Path(self.name).parts) + 1] / "blobs" / self.etag


class PartialFile:
    """The part of a remote file that has arrived. Writes are safe from several threads; the caller locks `arrived`."""

    def __init__(self, remote: RemoteFile) -> None:
        self.remote = remote
        self.remotes = [remote]  # the same file, under other names or revisions of its model
        self.path = remote.blob.with_name(remote.etag + SUFFIX)
        self.arrived = Ranges()
        self.hashed = 0
        self._lock = RLock()  # no descriptor is closed while another thread writes to it
        self._journal_path = self.path.with_name(self.path.name + JOURNAL)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._journal = -1
        try:
            self._take()
            self._resume()
        except BaseException:
            self.close()
            raise
        self._digest = self._new_digest()

    def _take(self) -> None:
        """Lock the file for this process. Raises InputError if another one fetches it."""
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(self.path).st_ino == os.fstat(self._file).st_ino:
                return
        raise InputError(
            f"{self.remote} is being fetched by another gemma2 process", "wait for it, or merge without --stream"
        )

    def _resume(self) -> None:
        """Take up what an earlier process left, if it fits the file on the hub."""
        lines = self._journal_path.read_text(encoding="ascii").splitlines() if self._journal_path.exists() else []
        size = self.remote.size
        if lines and lines[0] == str(size) and os.fstat(self._file).st_size == size:
            for line in lines[1:]:
                numbers = line.split()
                if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
                    self.arrived.add(int(numbers[0]), min(int(numbers[1]), size))
            flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
            self._journal = os.open(self._journal_path, flags)
            os.write(self._journal, b"\n")  # ends a line that was cut
            return
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, size)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._journal = os.open(self._journal_path, flags, 0o666)
        os.write(self._journal, f"{size}\n".encode())

    def write(self, data: bytes, first: int) -> bool:
        """Write bytes at their place. False if the file was closed. Raises OutputError."""
        with self._lock:
            if self._file < 0:
                return False
            view = memoryview(data)
            try:
                while view:
                    done = os.pwrite(self._file, view, first)
                    view, first = view[done:], first + done
            except OSError as error:
                raise OutputError(
                    f"{self.path}: {error.strerror}", "free some space for the cache; what has arrived is kept"
                ) from error
            return True

    def record(self, first: int, end: int) -> None:
        """List a range that was written."""
        with self._lock:
            if self._journal >= 0 and first < end:
                os.write(self._journal, f"{first} {end}\n".encode())

    @property
    def whole(self) -> bool:
        """Whether every byte has arrived."""
        return self.arrived.covers(0, self.remote.size)

    def _new_digest(self) -> hashlib._Hash | None:
        if SHA256.fullmatch(self.remote.etag):
            return hashlib.sha256()
        if GIT.fullmatch(self.remote.etag):
            return hashlib.sha1(b"blob %d\0" % self.remote.size, usedforsecurity=False)
        return None

    def hash_to(self, end: int) -> None:
        """Take the bytes up to `end`, which have arrived, into the digest."""
        with self._lock:
            if self._file < 0:
                return
            data = os.pread(self._file, end - self.hashed, self.hashed)
        if self._digest is not None:
            self._digest.update(data)
        self.hashed += len(data)

    def publish(self) -> None:
        """Give a whole file its place in the cache. Raises InputError if its bytes are not those of the hub."""
        with self._lock:
            if self._digest is not None and self._digest.hexdigest() != self.remote.etag:
                self.drop()
                raise InputError(
                    f"{self.remote}: the bytes that arrived do not have the digest that the hub states",
                    "merge again: it is fetched anew",
                )
            os.fsync(self._file)
            self.path.replace(self.remote.blob)
            for remote in self.remotes:
                link(remote)
            self._journal_path.unlink(missing_ok=True)
            self.close()

    def drop(self) -> None:
        """Remove what has arrived."""
        with self._lock:
            self._journal_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Close the file, and with it the lock; what has arrived stays."""
        with self._lock:
            for descriptor in (self._file, self._journal):
                if descriptor >= 0:
                    os.close(descriptor)
            self._file = self._journal = -1


def link(remote: RemoteFile) -> None:
    """Show a file that is whole in the snapshot: as a link to its blob, or without symbolic links as a hard link."""
    from huggingface_hub import constants

    remote.path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        if not getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
            with suppress(PermissionError, NotImplementedError):
                remote.path.symlink_to(os.path.relpath(remote.blob, remote.path.parent))
                return
        os.link(remote.blob, remote.path)
