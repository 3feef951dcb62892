"""Findings on disk while a run works, so that a killed one goes on where it was. Shingles lie in one file, mapped
when rows are compared: they are the larger part, and only those of candidates are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scan import Findings

__all__ = ["ChunkStore"]


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
            # Shingles of a chunk whose findings were not written any more are written again.
            size = 4 * int(self.column("sizes").sum(dtype=np.int64)) if self.done else 0
            os.truncate(self.shingle_file, size)

    def _path(self, number: int) -> Path:
        return self.directory / f"chunk-{number:08d}.npz"

    def append(self, findings: Findings) -> None:
        """Save the next chunk: shingles first, then the findings under their name in one rename."""
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

    def column(self, name: str) -> NDArray[Any]:
        """One array of the findings of all rows; the others are not read."""
        parts = []
        for number in range(self.done):
            with np.load(self._path(number), allow_pickle=False) as arrays:
                parts.append(arrays[name])
        return np.concatenate(parts)

    def shingles(self) -> NDArray[np.uint32]:
        """The shingles of all chunks, mapped from disk."""
        if not self.shingle_file.stat().st_size:
            return np.zeros(0, dtype=np.uint32)
        return np.memmap(self.shingle_file, dtype=np.uint32, mode="r").view(np.ndarray)
