"""BLAKE3 digests of bytes and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["digest_file", "digest_name", "hasher"]


def hasher(threads: int = 1) -> Any:
    """BLAKE3, ten times as fast as SHA-256 on a processor without instructions for that; `b3sum` gives the same."""
    from blake3 import blake3

    return blake3(max_threads=threads)


def digest_name(digest: Any) -> str:
    """`"blake3:<hex>"` of a hasher."""
    return f"blake3:{digest.hexdigest()}"


def digest_file(path: Path, threads: int = 1) -> str:
    """`"blake3:<hex>"` of a file's bytes."""
    digest = hasher(threads)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 << 20 if threads > 1 else 1 << 20)
        while got := file.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
    return digest_name(digest)
