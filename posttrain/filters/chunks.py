"""Findings on disk during a run, so that a killed run can continue. Shingles, the larger part, are stored in one file
that is mapped when rows are compared: only the shingles of candidates are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from .scan import Findings

__all__ = ["ChunkStore"]

# The columns of `Findings` by dtype.
Counts: TypeAlias = Literal["subsets", "sizes", "keys"]


class ChunkStore:
    """The findings of chunks 0, 1, ... in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.shingle_file = directory / "shingles.u32"
        self.done = 0
        while self._path(self.done).exists():
            self.done += 1
        if self.shingle_file.exists():
            # Shingles of a chunk without findings, which a kill left behind, are cut off and written again.
            size = 4 * int(self.column("sizes").sum(dtype=np.int64)) if self.done else 0
            os.truncate(self.shingle_file, size)

    def _path(self, number: int) -> Path:
        return self.directory / f"chunk-{number:08d}.npz"

    def append(self, findings: Findings) -> None:
        """Save the next chunk: shingles first, then the findings, renamed when complete."""
        with self.shingle_file.open("ab") as file:
            file.write(findings.shingles.tobytes())
            file.flush()
            os.fsync(file.fileno())
        path = self._path(self.done)
        aside = path.with_name(f".{path.name}.tmp")
        with aside.open("wb") as file:
            findings.save(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        self.done += 1

    def __iter__(self) -> Iterator[Findings]:
        return (Findings.load(self._path(number)) for number in range(self.done))

    @overload
    def column(self, name: Counts) -> NDArray[np.uint32]: ...
    @overload
    def column(self, name: Literal["codes"]) -> NDArray[np.uint8]: ...
    @overload
    def column(self, name: Literal["refuses"]) -> NDArray[np.bool_]: ...
    @overload
    def column(self, name: Literal["digests"]) -> NDArray[np.uint64]: ...

    def column(self, name: str) -> NDArray[np.generic]:
        """Read one array of the findings of all rows, without the others."""
        parts = []
        for number in range(self.done):
            with np.load(self._path(number), allow_pickle=False) as arrays:
                parts.append(arrays[name])
        return np.concatenate(parts)

    def shingles(self) -> NDArray[np.uint32]:
        """Return the shingles of all chunks, mapped from disk."""
        if not self.shingle_file.stat().st_size:
            return np.zeros(0, dtype=np.uint32)
        return np.memmap(self.shingle_file, dtype=np.uint32, mode="r").view(np.ndarray)
