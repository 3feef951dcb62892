"""Data for the comparison of two rows: a digest of the text, the word shingles and their MinHash bands (Broder 1997).

    J(A, B) = |A & B| / |A | B|       P(two rows share a band of r hashes) = J^r       P(candidate) = 1 - (1 - J^r)^b

r is the largest number of rows in a band with which b = HASHES // r bands find a pair at the threshold with
probability FOUND. One changed word removes w of S shingles and adds w: J = (S - w) / (S + w). If that is already below
the threshold, S < w (1 + t) / (1 - t), a single word decides, as in short questions: such rows have no bands, and only
their exact duplicates count. Hashes by rensa.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .contamination import MULTIPLIER, ngram_hashes
from .sample import Sample, normal, word_ids

__all__ = ["BandPlan", "Bands", "band_keys", "exact_digest", "plan_bands", "shingles"]

HASHES = 64
FOUND = 0.99
SEED = 0  # of the permutations: fixed by the format, not set by a run

Bands = NDArray[np.uint32]


@dataclass(frozen=True)
class BandPlan:
    """Shingles of `words` words; `bands` x `rows` hashes; rows with fewer than `fewest` shingles are not compared."""

    words: int
    threshold: float
    bands: int
    rows: int
    fewest: int


def plan_bands(threshold: float, words: int) -> BandPlan:
    """Return the bands for a Jaccard threshold in (0, 1)."""
    rows = max((r for r in range(1, HASHES + 1) if 1 - (1 - threshold**r) ** (HASHES // r) >= FOUND), default=1)
    fewest = math.ceil(words * (1 + threshold) / (1 - threshold) - 1e-9)
    return BandPlan(words, threshold, HASHES // rows, rows, fewest)


def exact_digest(sample: Sample, side: str) -> bytes:
    """Return 16 bytes of BLAKE2b over the normalised turns of a side."""
    digest = hashlib.blake2b(digest_size=16)
    for index in sample.chosen(side):
        ours, text = sample.turns[index]
        digest.update(b"\x01" if ours else b"\x00")
        digest.update(normal(text).encode() + b"\xff")
    return digest.digest()


def shingles(sample: Sample, side: str, plan: BandPlan) -> NDArray[np.uint32]:
    """Return (S,) sorted distinct 32-bit hashes of the shingles of a side; (0,) if too few for a comparison."""
    ids = np.concatenate([sample.ids[index] for index in sample.chosen(side)] or [word_ids([])])
    if len(ids) - plan.words + 1 < plan.fewest:
        return np.empty(0, dtype=np.uint32)
    found = (ngram_hashes(ids, plan.words) >> np.uint64(32)).astype(np.uint32)
    found.sort()
    new = np.empty(len(found), dtype=bool)
    new[0] = True
    np.not_equal(found[1:], found[:-1], out=new[1:])
    found = found[new]
    return found if len(found) >= plan.fewest else found[:0]


def band_keys(sets: Sequence[NDArray[np.uint32]], plan: BandPlan) -> Bands:
    """Return (N, bands) keys of N shingle sets that are not empty."""
    from rensa import RMinHash

    if not sets:
        return np.empty((0, plan.bands), dtype=np.uint32)
    flat = np.concatenate(sets).astype(np.uint64)
    ends = np.cumsum([0, *(len(one) for one in sets)]).astype(np.uint64)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, plan.bands * plan.rows, SEED)
    hashes = np.array(digests.to_rows(), dtype=np.uint64).reshape(len(sets), plan.bands, plan.rows)
    keys = np.zeros((len(sets), plan.bands), dtype=np.uint64)
    for place in range(plan.rows):
        keys = (keys + hashes[:, :, place] + np.uint64(1)) * MULTIPLIER
    return (keys >> np.uint64(32)).astype(np.uint32)
