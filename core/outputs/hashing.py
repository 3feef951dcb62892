"""BLAKE3 digests of bytes, files and tensors.

A tensor is hashed in pieces, and its digest is the one of the digests of its pieces: whoever reads a tensor for another
purpose, in any order and from several threads, can hash it on the way, while the processor has the bytes at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["HASHED_BYTES", "Hasher", "TensorHasher", "digest_file", "digest_name", "digest_of_pieces", "hasher"]

HASHED_BYTES = 1 << 20  # of a piece of a tensor


class Hasher(Protocol):
    """A running digest, as in `hashlib`."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Add bytes to the digest."""
        ...

    def digest(self) -> bytes:
        """The digest of the bytes so far."""
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


def digest_of_pieces(digests: Sequence[bytes]) -> str:
    """Return the hexadecimal digest of a tensor from those of its pieces of HASHED_BYTES; of a single one its own."""
    if len(digests) == 1:
        return digests[0].hex()
    total = hasher()
    total.update(b"".join(digests))
    return total.hexdigest()


class TensorHasher:
    """The digest of a tensor from its bytes in order."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._running = hasher()
        self._room = HASHED_BYTES

    def update(self, data: memoryview) -> None:
        """Add bytes to the digest."""
        while data:
            if not self._room:
                self._done.append(self._running.digest())
                self._running, self._room = hasher(), HASHED_BYTES
            part, data = data[: self._room], data[self._room :]
            self._running.update(part)
            self._room -= len(part)

    def hexdigest(self) -> str:
        """Return the digest of the bytes so far, in hexadecimal."""
        return digest_of_pieces([*self._done, self._running.digest()])


def digest_file(path: Path, threads: int = 1) -> str:
    """Return `"blake3:<hex>"` of a file's bytes."""
    digest = hasher(threads)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 << 20 if threads > 1 else 1 << 20)
        while got := file.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
    return digest_name(digest)
