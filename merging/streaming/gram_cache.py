"""Inner products of earlier merges: another t, eta or granularity over the same models needs no first pass.

A few KB per set of models in the user's cache directory ($XDG_CACHE_HOME/gemma2/products). The name of a file is a
digest of everything that decides its numbers: real path, inode, size and times of change of each weight file, and the
sources of every tensor. So weights that were written to, replaced or moved miss the cache. The file begins with a
digest of the rest: a damaged one is not used. If the cache cannot be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from gemma2.core.home import cache_folder
from gemma2.core.json_files import parse_json
from gemma2.core.outputs.manifest import metadata_version
from gemma2.merging.kernels.dense import BLOCK
from gemma2.merging.kernels.number_formats import Doubles
from gemma2.merging.methods.method import Group
from gemma2.merging.plan.groups import Source
from gemma2.merging.plan.merge_plan import MergePlan

__all__ = ["Products"]

MOST_FILES = 64  # then the oldest are removed


class Products:
    """Sums over each tensor, (1 + pairs,) fp64: from the cache, or computed by this merge."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._file: Path | None = None  # known when every file is whole
        self._sums: dict[str, Doubles] = {}
        self._known = False
        if plan.arrivals.pending:
            return
        self._file = _place(plan)
        with suppress(OSError, ValueError, TypeError):  # missing or malformed: computed again
            digest, _, text = self._file.read_text(encoding="utf-8").partition("\n")
            if digest == _digest(text):
                self._sums = {name: np.array(values, np.float64) for name, values in parse_json(text).items()}
                self._known = set(self._sums) == set(plan.parts)

    def known(self, group: Group) -> dict[str, Doubles] | None:
        """Return the sums of a group's tensors, or None."""
        return {name: self._sums[name] for name in group.tensors} if self._known else None

    def keep(self, group: Group, sums: dict[str, Doubles]) -> None:
        """Remember the sums of a group."""
        self._sums |= sums

    def save(self) -> None:
        """Write computed sums in one rename, and remove the oldest files."""
        if self._known:
            return
        with suppress(OSError):
            place = self._file or _place(self._plan)
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_suffix(f".{os.getpid()}.tmp")
            text = json.dumps({name: values.tolist() for name, values in self._sums.items()})
            temporary.write_text(f"{_digest(text)}\n{text}", encoding="utf-8")
            temporary.replace(place)
            files = sorted(place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in files[:-MOST_FILES]:
                old.unlink(missing_ok=True)


def _place(plan: MergePlan) -> Path:
    return cache_folder("products") / f"{_key(plan)}.json"


def _key(plan: MergePlan) -> str:
    """Return a digest of everything that decides the sums."""
    files = {str(file): _stamp(file) for model in plan.inputs for file in model.files}
    parts = {name: [_operand(source) for source in part.sources] for name, part in plan.parts.items()}
    decides = [metadata_version(), BLOCK, plan.base is not None, sorted(files.items()), sorted(parts.items())]
    return _digest(json.dumps(decides))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _operand(source: Source) -> tuple[object, ...]:
    """Return the values that, with the files, decide the numbers of an operand."""
    adapted = source.update and source.update.scale
    return str(source.tensor.file), source.tensor.offset, adapted, source.rows and source.rows.digest


def _stamp(file: Path) -> tuple[str, int, int, int, int, int]:
    status = file.stat()
    real = str(file.resolve())
    return real, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
