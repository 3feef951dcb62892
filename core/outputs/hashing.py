"""BLAKE3 digests of bytes and files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

__all__ = ["Hasher", "digest_file", "digest_name", "hasher"]


class Hasher(Protocol):
    """A running digest, as in `hashlib`."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Add bytes to the digest."""
        ...

    def hexdigest(self) -> str:
        """The digest of the bytes so far, in hexadecimal."""
        ...


def hasher(threads: int = 1) -> Hasher:
    """Return a BLAKE3 hasher: ten times as fast as SHA-256 without processor support; `b3sum` gives the same."""
    from blake3 import blake3

    found: Hasher = blake3(max_threads=threads)
    return found


def digest_name(digest: Hasher) -> str:
    """Return `"blake3:<hex>"` of a hasher."""
    return f"blake3:{digest.hexdigest()}"


def digest_file(path: Path, threads: int = 1) -> str:
    """Return `"blake3:<hex>"` of a file's bytes."""
    digest = hasher(threads)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 << 20 if threads > 1 else 1 << 20)
        while got := file.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
    return digest_name(digest)
