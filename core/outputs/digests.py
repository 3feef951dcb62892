"""Digests of inputs and outputs: of a file's bytes, and of a model's tensors. Read once per state of the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import load_json

from .digest_cache import remembered
from .hashing import Hasher, digest_file, digest_name, hasher
from .safetensors_header import Tensor, read_header, weight_files

__all__ = ["INDEX", "digest_input", "digest_of_tensors", "digest_weights", "indexed_tensors", "tensor_line"]

PIECE = 4 << 20  # bytes read at a time
INDEX = "model.safetensors.index.json"


def digest_input(path: Path, threads: int = 1) -> str:
    """Return `"blake3:<hex>"` of a file's bytes (`digest_file`), without reading what was read before."""
    return remembered("file", [path], lambda: digest_file(path, threads))


def digest_weights(directory: Path, threads: int = 1) -> str:
    """Return one digest of all tensors of a model directory: over (name, dtype, shape, bytes) in the order of names.

    Padding of headers, order in the files and the division into shards do not matter. Where an index of shards names
    the file of a tensor, only that copy counts, as for everyone who loads the model.
    Raises InputError for a file that is not safetensors.
    """
    files = weight_files(directory)
    index = directory / INDEX
    read = [*files, *([index] if index.is_file() else [])]
    return remembered("tensors", read, lambda: _digest_tensors(files, indexed_tensors(index), threads))


def indexed_tensors(index: Path) -> Mapping[str, str]:
    """Return tensor -> file name by the index of shards; empty without one."""
    try:
        found = load_json(index)["weight_map"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is not an index of shards ({type(error).__name__})", "restore the file") from error
    return found if isinstance(found, dict) else {}


def tensor_line(tensor: Tensor, digest: str) -> str:
    """Return what the digest of a model takes of one tensor. digest: of its bytes, in hexadecimal."""
    return json.dumps([tensor.name, tensor.dtype, tensor.shape, digest])


def digest_of_tensors(lines: Iterable[str]) -> str:
    """Return the digest of a model from the lines of its tensors."""
    total = hasher()
    total.update("\n".join(sorted(lines)).encode())
    return digest_name(total)


def _digest_tensors(files: list[Path], indexed: Mapping[str, str], threads: int) -> str:
    lines: list[str] = []
    for path in files:
        tensors = [t for t in read_header(path).values() if indexed.get(t.name, path.name) == path.name]
        lines += _tensor_lines(path, tensors, threads)
    return digest_of_tensors(lines)


def _tensor_lines(path: Path, tensors: list[Tensor], threads: int) -> Iterator[str]:
    """Yield the lines of the tensors of one file, in the order of their data."""
    buffer = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        for tensor in tensors:
            digest: Hasher = hasher(threads)
            file.seek(tensor.offset)
            left = tensor.nbytes
            while left and (got := file.readinto(buffer[: min(left, PIECE)])):
                digest.update(buffer[:got])
                left -= got
            yield tensor_line(tensor, digest.hexdigest())
