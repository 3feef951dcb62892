"""Digests of files that were read before, in the user's cache: a file is read again once anything about it differs.

A digest is stored under a stamp of the file: inode, size, mtime and ctime, in nanoseconds, of the moment before it was
read. No call can set a ctime back, so a file with the same stamp has the same bytes, unless it was written twice within
one tick of the file system's clock. A stamp is therefore stored only if that clock had moved on when the file was read.
Copies, links, changed modes and touched files have other stamps: they are read once, and stored again.

    ~/.cache/gemma2/digests/log    one line per digest, only ever appended:  KEY DIGEST CHECK
    KEY    BLAKE3 of what was computed and of the stamps, so that the file names no path
    CHECK  of the line: torn lines are skipped

A cache that cannot be written costs time, never a result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from gemma2.core.home import cache_folder

from .hashing import hasher

__all__ = ["DigestReading", "Stamp", "remembered", "stamp_of", "store"]

Stamp = tuple[int, int, int, int]  # inode, size, mtime and ctime in ns

TICK = 20_000_000  # ns; the clock of Linux file systems moves every 1 to 10 ms
COARSE_TICK = 2_000_000_000  # ns, where times have whole seconds only: HFS+, FAT, some network file systems
WORTH_WAITING = 16 << 20  # bytes; reading fewer again is quicker than waiting for a tick
LOG_BYTES = 8 << 20  # the older half is dropped beyond that
KEY_HEX, CHECK_HEX = 32, 8


def stamp_of(path: Path) -> Stamp:
    """Return the stamp of a file in its present state. Raises OSError."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class DigestReading:
    """Files that are about to be read for a digest, and the digest of an earlier reading with the stamps of now.

    known  the earlier digest; None if the files must be read
    """

    def __init__(self, kind: str, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._stamps = [stamp_of(path) for path in paths]
        self._key = _key(kind, self._stamps)
        self.known = _known_digest(self._key)
        self._settled = self.known is None and _settled(self._stamps)

    def keep(self, digest: str) -> str:
        """Remember the digest that was found by reading, and return it."""
        if self._settled and [stamp_of(path) for path in self._paths] == self._stamps:  # else written to meanwhile
            _KNOWN[self._key] = digest
            _append(self._key, digest)
        return digest


def remembered(kind: str, paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return `compute()` of these files, or its earlier result for files with the stamps that they have now.

    kind     the name of what is computed
    compute  must depend on nothing but the bytes of the files, and on `kind`
    """
    reading = DigestReading(kind, paths)
    return reading.keep(compute()) if reading.known is None else reading.known


def store(kind: str, paths: Sequence[Path], stamps: Sequence[Stamp], began: int, digest: str) -> None:
    """Store a digest that was found by reading the files, over an earlier one of the same stamps.

    stamps  of the files, taken before they were read
    began   the time in ns at which they were taken

    Bytes that rot on the disk change no stamp: what was read there last counts.
    """
    key = _key(kind, stamps)
    if _known_digest(key) == digest or began < max((_not_before(stamp) for stamp in stamps), default=0):
        return
    with suppress(OSError):
        if [stamp_of(path) for path in paths] == [*stamps]:
            _KNOWN[key] = digest
            _append(key, digest)


def _settled(stamps: Sequence[Stamp]) -> bool:
    """Whether a later write would give each file another stamp. Waits for the next tick where reading takes longer."""
    wait = max((_not_before(stamp) for stamp in stamps), default=0) - time.time_ns()
    if 0 < wait <= TICK and sum(size for _, size, _, _ in stamps) >= WORTH_WAITING:
        time.sleep(wait / 1e9)
        return True
    return wait <= 0


def _not_before(stamp: Stamp) -> int:
    """The time, in ns, from which a write has another stamp than the one before."""
    _, _, modified, changed = stamp
    return changed + (TICK if changed % 1_000_000_000 or modified % 1_000_000_000 else COARSE_TICK)


def _key(kind: str, stamps: Sequence[Stamp]) -> str:
    digest = hasher()
    digest.update(repr((kind, [*stamps])).encode())
    return digest.hexdigest()[:KEY_HEX]


# --- the log ----------------------------------------------------------------------------------------------------------

_KNOWN: dict[str, str] = {}
_LINES: dict[bytes, bytes] = {}  # key -> its line of the log, not checked yet
_READ: dict[Path, int] = {}  # log -> bytes of it that are in _LINES


def _log() -> Path:
    return cache_folder("digests") / "log"


def _known_digest(key: str) -> str | None:
    """Return a digest that this process knows, or that the log holds by now."""
    if key in _KNOWN:
        return _KNOWN[key]
    _read_on(_log())
    words = _LINES.get(key.encode(), b"").decode("ascii", "replace").split(" ")
    if len(words) != 3 or words[2] != _check(words[0], words[1]):
        return None
    _KNOWN[key] = words[1]
    return words[1]


def _read_on(path: Path) -> None:
    """Take in what was appended to the log since it was read last."""
    try:
        size = path.stat().st_size
    except OSError:
        return
    before = _READ.get(path, 0)
    if size == before:
        return
    before = before if before < size else 0  # shorter: another process has dropped the older half
    with suppress(OSError), path.open("rb") as file:
        file.seek(before)
        text = file.read()
        whole = text.rfind(b"\n") + 1
        _LINES.update((line[:KEY_HEX], line) for line in text[:whole].splitlines())
        _READ[path] = before + whole


def _check(key: str, digest: str) -> str:
    found = hasher()
    found.update(f"{key} {digest}".encode())
    return found.hexdigest()[:CHECK_HEX]


def _append(key: str, digest: str) -> None:
    path = _log()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{key} {digest} {_check(key, digest)}\n".encode())
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if size > LOG_BYTES:
            _drop_older_half(path)


def _drop_older_half(path: Path) -> None:
    text = path.read_bytes()
    rest = text[len(text) // 2 :]
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_bytes(rest[rest.find(b"\n") + 1 :])
    aside.replace(path)
