"""Which tensors have one row per token id, and their rows taken from several inputs in another order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .errors import InputError

__all__ = ["RowMap", "embedding_rows", "vocabulary_tensors"]

EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")


@dataclass(frozen=True, eq=False)
class RowMap:
    """Rows of the output as runs of consecutive rows of the inputs.

    count   rows of the output
    starts  (R,) int64: the row of the output at which a run begins, ascending from 0
    models  (R,) int64: whose rows, an index into `inputs`
    rows    (R,) int64: the first of them there
    """

    count: int
    starts: NDArray[np.int64]
    models: NDArray[np.int64]
    rows: NDArray[np.int64]
    inputs: tuple[Checkpoint, ...]

    def pieces(self, first: int, count: int, width: int) -> Iterator[tuple[Checkpoint, int, int]]:
        """Elements [first, first + count) of the output as (input, first element there, number), `width` in a row."""
        run = int(np.searchsorted(self.starts, first // width, side="right")) - 1
        end = first + count
        while first < end:
            begin = int(self.starts[run])
            next_row = int(self.starts[run + 1]) if run + 1 < len(self.starts) else self.count
            stop = min(end, next_row * width)
            there = (int(self.rows[run]) - begin) * width + first
            yield self.inputs[self.models[run]], there, stop - first
            first, run = stop, run + 1

    @cached_property
    def digest(self) -> str:
        """Of the map and the files that it reads."""
        digest = hashlib.blake2b(str([str(file) for model in self.inputs for file in model.files]).encode())
        for array in (self.starts, self.models, self.rows):
            digest.update(array.tobytes())
        return f"{self.count} {digest.hexdigest()}"


def vocabulary_tensors(model: Checkpoint) -> set[str]:
    """Names of the tensors that have a row per id: the embedding, and a head of its own."""
    rows = embedding_rows(model)
    named = (name for name in model.tensors if EMBEDDINGS.search(name) or HEADS.search(name))
    return {name for name in named if model.tensors[name].shape[:1] == (rows,)}


def embedding_rows(model: Checkpoint) -> int:
    """Rows of the embedding. Raises InputError where none is known by its name."""
    name = next((name for name in model.tensors if EMBEDDINGS.search(name)), None)
    if name is None or not model.tensors[name].shape:
        raise InputError(f"{model} has no embedding of a known name", "leave out --tokenizer")
    return model.tensors[name].shape[0]
