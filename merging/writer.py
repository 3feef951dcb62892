"""Writes a model directory: shards in the library's naming, allocated whole, filled in place; companion files copied.

Writes are `pwrite` at the final offset, so that threads need no order among themselves.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checkpoint import INDEX, WEIGHTS, read_json
from .errors import OutputError
from .header import ITEM_BYTES, encode_header

__all__ = ["Layout", "Writer", "copy_companions"]

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name, in the order of the file

MAX_SHARD_BYTES = 5_000_000_000
# What makes a model directory loadable besides the weights. Nothing else is taken over.
COMPANIONS = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)


class Writer:
    """Writes one model directory's weights in place. Safe to share between threads; made by `Writer.create`."""

    def __init__(self, descriptors: Mapping[str, int], offsets: Mapping[str, int]) -> None:
        self._descriptors = descriptors  # by tensor name
        self._offsets = offsets

    @classmethod
    @contextmanager
    def create(cls, directory: Path, tensors: Layout) -> Iterator[Writer]:
        """Allocate files of at most MAX_SHARD_BYTES (or one tensor) and write their headers.

        The division depends on nothing but the layout, so equal merges give equal files.
        """
        shards = _divide(tensors, MAX_SHARD_BYTES)
        names = shard_names(len(shards))
        descriptors: dict[str, int] = {}
        offsets: dict[str, int] = {}
        with ExitStack() as stack:
            for file, shard in zip(names, shards, strict=True):
                header, starts = encode_header(shard)
                descriptor = os.open(directory / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, descriptor)
                size = len(header) + sum(_nbytes(*entry) for entry in shard.values())
                _allocate(descriptor, size, directory / file)
                _write_all(descriptor, memoryview(header), 0)
                descriptors |= dict.fromkeys(shard, descriptor)
                offsets |= starts
            if len(shards) > 1:
                _write_index(directory, names, shards)
            yield cls(descriptors, offsets)

    def write(self, name: str, first: int, item: int, data: NDArray[np.uint8]) -> None:
        """Bytes of the elements from `first` on, each of `item` bytes."""
        _write_all(self._descriptors[name], memoryview(data), self._offsets[name] + first * item)  # type: ignore[arg-type]


def shard_names(count: int) -> list[str]:
    """The file names that transformers looks for."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


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


def copy_companions(source: Path, directory: Path, dtype: str | None) -> None:
    """Configuration and tokenizer of a model into another directory, byte for byte.

    With `dtype` the configuration says so, since transformers loads weights as the configuration tells.
    """
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if dtype is not None:
        config = read_json(directory / "config.json")
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        text = json.dumps(config | {key: dtype}, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
