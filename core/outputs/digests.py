"""Digests of inputs and outputs: of a file's bytes, and of a model's tensors. Read once per state of the files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from gemma2.core.errors import InputError
from gemma2.core.json_files import load_json

from .digest_cache import DigestReading, remembered
from .hashing import HASHED_BYTES, digest_file, digest_name, digest_of_pieces, hasher
from .safetensors_header import Tensor, read_header, weight_files

__all__ = [
    "INDEX",
    "WeightsDigest",
    "digest_input",
    "digest_of_tensors",
    "digest_weights",
    "indexed_tensors",
    "tensor_line",
]

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
    return WeightsDigest(directory).finish(threads)


class WeightsDigest:
    """`digest_weights` of a model that is being read for another purpose: tensors are hashed as they pass by.

    Safe to share between threads. Nothing is hashed if the digest is known from an earlier reading.
    """

    def __init__(self, directory: Path) -> None:
        files, index = weight_files(directory), directory / INDEX
        self._reading = DigestReading("tensors", [*files, *([index] if index.is_file() else [])])
        self._found = self._reading.known
        self._tensors: list[Tensor] = []
        self._pieces: dict[tuple[Path, str], list[bytes | None]] = {}
        if self._found is None:
            indexed = indexed_tensors(index)
            for path in files:
                self._tensors += [t for t in read_header(path).values() if indexed.get(t.name, path.name) == path.name]
            self._pieces = {
                _place(t): [None] * -(-t.nbytes // HASHED_BYTES) or [_digest(memoryview(b""))] for t in self._tensors
            }

    def add(self, tensor: Tensor, first: int, data: memoryview) -> None:
        """Hash the pieces of a tensor that bytes from `first` on cover; the rest is read by `finish`."""
        pieces = self._pieces.get(_place(tensor))
        if pieces is None or first % HASHED_BYTES:
            return
        end = first + len(data)
        for begin in range(first, end, HASHED_BYTES):
            stop = min(begin + HASHED_BYTES, tensor.nbytes)
            if stop <= end:
                pieces[begin // HASHED_BYTES] = _digest(data[begin - first : stop - first])

    def finish(self, threads: int = 1) -> str:
        """Read what was not hashed on the way, and return the digest. Raises OSError."""
        if self._found is None:
            for path in dict.fromkeys(tensor.file for tensor in self._tensors):
                self._read_missing(path, threads)
            lines = []
            for tensor in self._tensors:
                pieces = [piece for piece in self._pieces[_place(tensor)] if piece is not None]
                lines.append(tensor_line(tensor, digest_of_pieces(pieces)))
            self._found = self._reading.keep(digest_of_tensors(lines))
        return self._found

    def read(self, stopped: Event) -> None:
        """Read and hash all that did not pass by yet, unless it is stopped."""
        for path in dict.fromkeys(tensor.file for tensor in self._tensors):
            self._read_missing(path, 1, stopped)

    def _read_missing(self, path: Path, threads: int, stopped: Event | None = None) -> None:
        """Read and hash the pieces of one file that did not pass by."""
        missing = [
            (tensor, number)
            for tensor in self._tensors
            if tensor.file == path
            for number, piece in enumerate(self._pieces[_place(tensor)])
            if piece is None
        ]
        if not missing:
            return
        left = iter(missing)

        def work(descriptor: int) -> None:
            buffer = memoryview(bytearray(HASHED_BYTES))
            for tensor, number in left:  # each is taken by one thread
                if stopped is not None and stopped.is_set():
                    return
                self._pieces[_place(tensor)][number] = _digest_piece(descriptor, tensor, number, buffer)

        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for future in [pool.submit(work, descriptor) for _ in range(threads)]:
                    future.result()
        finally:
            os.close(descriptor)


def _place(tensor: Tensor) -> tuple[Path, str]:
    return tensor.file, tensor.name


def _digest(data: memoryview) -> bytes:
    found = hasher()
    found.update(data)
    return found.digest()


def _digest_piece(descriptor: int, tensor: Tensor, number: int, buffer: memoryview) -> bytes:
    """Return the digest of one piece of a tensor; of fewer bytes if the file has become shorter."""
    first = number * HASHED_BYTES
    room = buffer[: min(HASHED_BYTES, tensor.nbytes - first)]
    done = 0
    while done < len(room) and (got := os.preadv(descriptor, [room[done:]], tensor.offset + first + done)):
        done += got
    return _digest(room[:done])


def indexed_tensors(index: Path) -> Mapping[str, str]:
    """Return tensor -> file name by the index of shards; empty without one."""
    try:
        found = load_json(index)["weight_map"]
    except FileNotFoundError:
        return {}
    except InputError:  # a pipe, a key twice
        raise
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
