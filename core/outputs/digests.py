"""Digests of inputs: recorded ones for files that are unchanged since their manifest, else computed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from .hashing import digest_file, digest_name, hasher
from .manifest import MANIFEST, FileRecord, read_manifest
from .safetensors_header import weight_files

__all__ = ["digest_input", "digest_weights"]


def digest_input(path: Path, threads: int = 1) -> str:
    """Return the `digest_file` of an input without reading it, where that is possible.

    The digest in the manifest next to it is trusted for a file that has not changed since; any other file is read once
    per process and state.
    """
    manifest = read_manifest(path.parent) or {}
    entry = manifest.get("files", {}).get(path.name) if manifest.get("status") == "complete" else None
    if isinstance(entry, dict) and _untouched(path, entry, path.parent / MANIFEST):
        return str(entry["digest"])
    status = path.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _digest_of(path, threads, state)


@lru_cache(maxsize=4096)
def _digest_of(path: Path, threads: int, state: tuple[int, ...]) -> str:
    """Return the digest of a file in one state of its inode."""
    return digest_file(path, threads)


def digest_weights(directory: Path, threads: int = 1) -> str:
    """Return one digest of all weights of a model directory: over (name, digest) of its safetensors files.

    Digests in a complete manifest are trusted for files that have not changed since.
    """
    total = hasher()
    for path in weight_files(directory):
        total.update(f"{path.name} {digest_input(path, threads)}\n".encode())
    return digest_name(total)


def _untouched(path: Path, entry: FileRecord, manifest: Path) -> bool:
    """Whether a file has the recorded size and is older than the manifest, by ctime: no call can set that back."""
    status = path.stat()
    if "digest" not in entry:
        return False
    return entry.get("size") == status.st_size and status.st_ctime_ns <= manifest.stat().st_ctime_ns
