"""The tensors that have one row per token id, and maps that take their rows from several inputs in another order."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import InputError
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.kernels.file_passes import read_all
from gemma2.merging.kernels.native import compiled
from gemma2.merging.kernels.number_formats import Bytes

__all__ = ["ZEROS", "RowMap", "embedding_rows", "gather", "vocabulary_tensors"]

Longs = NDArray[np.int64]

EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
ZEROS = -1
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")


@dataclass(frozen=True, eq=False)
class RowMap:
    """Rows of the output as runs of consecutive rows of the inputs.

    count   rows of the output
    starts  (R,) int64: the row of the output at which a run begins, ascending from 0
    models  (R,) int64: the input that the run is taken from, an index into `inputs`; ZEROS for rows of zeros
    rows    (R,) int64: the first row of the run in that input
    """

    count: int
    starts: Longs
    models: Longs
    rows: Longs
    inputs: tuple[Checkpoint, ...]

    def spans(self, first: int, count: int, width: int) -> tuple[Longs, Longs, Longs]:
        """Return elements [first, first + count) of the output, `width` per row, as consecutive spans of the inputs.

        Arrays (P,): index of the input, first element in it, number of elements.
        """
        low = int(np.searchsorted(self.starts, first // width, side="right")) - 1
        high = int(np.searchsorted(self.starts * width, first + count))
        starts = self.starts[low:high] * width
        begins = np.maximum(starts, first)
        counts = np.diff(begins, append=first + count)
        return self.models[low:high], self.rows[low:high] * width + begins - starts, counts

    @cached_property
    def digest(self) -> str:
        """The digest of the map and of the paths that it reads."""
        digest = hashlib.blake2b(str([str(file) for model in self.inputs for file in model.files]).encode())
        for array in (self.starts, self.models, self.rows):
            digest.update(array.tobytes())
        return f"{self.count} {digest.hexdigest()}"


def vocabulary_tensors(model: Checkpoint) -> set[str]:
    """Return the names of the tensors that have a row per id: the embedding, and an untied head."""
    rows = embedding_rows(model)
    named = (name for name in model.tensors if EMBEDDINGS.search(name) or HEADS.search(name))
    return {name for name in named if model.tensors[name].shape[:1] == (rows,)}


def embedding_rows(model: Checkpoint) -> int:
    """Return the number of rows of the embedding. Raises InputError if no tensor has a known name of one."""
    name = next((name for name in model.tensors if EMBEDDINGS.search(name)), None)
    if name is None or not model.tensors[name].shape:
        raise InputError(f"{model} has no embedding of a known name", "leave out --tokenizer")
    return model.tensors[name].shape[0]


@compiled()
def gather(places: Longs, into: Bytes) -> bool:
    """Fill `into` with ranges of files, one after the other. False if one could not be read.

    places  (P, 3): descriptor, offset and bytes of each; the descriptor -1 stands for zeros
    """
    done = 0
    for k in range(len(places)):
        size = places[k, 2]
        if places[k, 0] < 0:
            into[done : done + size] = 0
        elif not read_all(places[k, 0], places[k, 1], into[done : done + size]):
            return False
        done += size
    return True
