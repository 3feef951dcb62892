"""Writes a model directory: shards named like transformers', allocated whole, filled in place; companion files copied.

Writes go to their final offset, so that threads need no order. Large outputs bypass the page cache (O_DIRECT): copying
5 GB into it costs as much CPU as the merge itself, and would evict the inputs. O_DIRECT needs whole pages, so tensors
of whole pages come first in a file; the few others go through the cache.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import OutputError
from gemma2.core.json_files import JsonMapping, read_json
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, PAGE_BYTES, encode_header
from gemma2.merging.inputs.checkpoint import COMPANIONS, INDEX, WEIGHTS

__all__ = ["DIRECT_BYTES", "Layout", "WritePlace", "Writer", "aligned", "copy_companions", "open_direct"]

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name, in the order of the file

MAX_SHARD_BYTES = 5_000_000_000
DIRECT_BYTES = 1 << 29  # smaller outputs stay in the page cache, for the command that reads them next


@dataclass(frozen=True)
class WritePlace:
    """The place of a tensor in an output: `offset` of its first byte, and two descriptors of the file.

    descriptor  may bypass the page cache, and then accepts whole pages only
    cached      goes through the page cache
    """

    descriptor: int
    offset: int
    cached: int


def aligned(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return zeroed bytes that begin on a page, as O_DIRECT requires."""
    return np.frombuffer(mmap.mmap(-1, max(prod(shape), 1)), np.uint8)[: prod(shape)].reshape(shape)


def open_direct(path: Path, flags: int) -> int | None:
    """Return a descriptor that bypasses the page cache; None if the system or the file system does not support it."""
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        return None
    try:
        return os.open(path, flags | direct | os.O_CLOEXEC)
    except OSError:  # tmpfs, some network file systems
        return None


class Writer:
    """Writes one model directory's weights in place. Safe to share between threads; made by `Writer.create`."""

    def __init__(self, directory: Path, places: Mapping[str, WritePlace]) -> None:
        self.directory = directory
        self.places = places

    @classmethod
    @contextmanager
    def create(cls, directory: Path, tensors: Layout, shard_bytes: int | None = None) -> Iterator[Writer]:
        """Allocate files of at most `shard_bytes` (or one tensor) and write their headers. Raises OutputError.

        The division into files depends only on the layout and that size, so equal merges give equal files.
        shard_bytes  None: MAX_SHARD_BYTES
        """
        shards = [_pages_first(shard) for shard in _divide(tensors, shard_bytes or MAX_SHARD_BYTES)]
        names = shard_names(len(shards))
        direct = sum(_nbytes(*entry) for entry in tensors.values()) >= DIRECT_BYTES
        places: dict[str, WritePlace] = {}
        with ExitStack() as stack:
            for file, shard in zip(names, shards, strict=True):
                places |= _create_file(stack, directory / file, shard, direct)
            if len(shards) > 1:
                _write_index(directory, names, shards)
            yield cls(directory, places)

    def write(self, name: str, first_byte: int, data: NDArray[np.uint8]) -> None:
        """Write bytes of a tensor, beginning at its `first_byte`. Raises OutputError."""
        place = self.places[name]
        offset = place.offset + first_byte
        descriptor = place.cached if offset % PAGE_BYTES or data.size % PAGE_BYTES else place.descriptor
        _write_all(descriptor, memoryview(data), offset)  # type: ignore[arg-type]


def _create_file(stack: ExitStack, path: Path, shard: Layout, direct: bool) -> dict[str, WritePlace]:
    """Create one file with its header; return the place of each tensor. Descriptors are closed with the stack."""
    header, starts = encode_header(shard)
    size = len(header) + sum(_nbytes(*entry) for entry in shard.values())
    cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, cached)
    _allocate(cached, size, path)
    _write_all(cached, memoryview(header), 0)
    bypass = _probe(path, header) if direct else None
    if bypass is not None:
        stack.callback(os.close, bypass)
    return {
        name: WritePlace(cached if bypass is None or _nbytes(*entry) % PAGE_BYTES else bypass, starts[name], cached)
        for name, entry in shard.items()
    }


def _probe(path: Path, header: bytes) -> int | None:
    """Return a descriptor that bypasses the page cache, if a write of the header succeeds on it; else None."""
    descriptor = open_direct(path, os.O_WRONLY)
    if descriptor is None:
        return None
    page = aligned((PAGE_BYTES,))
    page[:] = np.frombuffer(header[:PAGE_BYTES], np.uint8)
    try:
        os.pwrite(descriptor, memoryview(page), 0)  # type: ignore[arg-type]
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def shard_names(count: int) -> list[str]:
    """Return the file names that transformers expects."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def _pages_first(shard: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors with those of whole pages first, so that they begin on pages; otherwise in order."""
    return dict(sorted(shard.items(), key=lambda item: _nbytes(*item[1]) % PAGE_BYTES != 0))


def _divide(tensors: Layout, limit: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, entry in tensors.items():
        size = _nbytes(*entry)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += size
    return shards


def _write_index(directory: Path, names: list[str], shards: Sequence[Layout]) -> None:
    total = sum(_nbytes(*entry) for shard in shards for entry in shard.values())
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _allocate(descriptor: int, size: int, path: Path) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS
            os.ftruncate(descriptor, size)
    except OSError as error:
        raise OutputError(f"cannot allocate {size:,} bytes for {path} ({error.strerror})", "free some space") from error


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    try:
        while view:
            done = os.pwrite(descriptor, view, offset)
            view, offset = view[done:], offset + done
    except OSError as error:
        raise OutputError(f"writing the output failed ({error.strerror})", "check the disk and its space") from error


def copy_companions(source: Path, directory: Path, changes: JsonMapping) -> None:
    """Copy configuration and tokenizer of a model to another directory, byte for byte.

    changes  keys of config.json that the merge changes; `dtype` is written in the spelling of the file, since
             transformers loads weights in the dtype of the configuration
    """
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if changes:
        config = read_json(directory / "config.json")
        spelled = {
            "torch_dtype" if key == "dtype" and "torch_dtype" in config else key: changes[key] for key in changes
        }
        text = json.dumps(config | spelled, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
