"""Data for the comparison of two rows: a digest of the text, the word shingles and their MinHash bands (Broder 1997).

    J(A, B) = |A & B| / |A | B|       P(two rows share a band of r hashes) = J^r       P(candidate) = 1 - (1 - J^r)^b

r is the largest number of rows in a band with which b = HASHES // r bands find a pair at the threshold with
probability FOUND. One changed word removes w of S shingles and adds w: J = (S - w) / (S + w). If that is already below
the threshold, S < w (1 + t) / (1 - t), a single word decides, as in short questions: such rows have no bands, and only
their exact duplicates count. Hashes by rensa.

The lowest bit of a shingle says whose it is, so that answers can be compared by themselves: long instructions that rows
share do not make their answers alike. Some words always decide (`fixed_digest`): numbers, the signs between them, and
the words of an answer that is too short for a comparison. Rows that differ in them never share a band: a template that
is filled with other numbers is another task.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .contamination import MULTIPLIER, ngram_hashes
from .sample import Sample, normal, word_ids, words_of

__all__ = ["BandPlan", "Bands", "band_keys", "exact_digest", "fixed_digest", "plan_bands", "shingles"]

HASHES = 64
FOUND = 0.99
SEED = 0  # of the permutations: fixed by the format, not set by a run

SIGNS = "-+*/×÷−^"
SIGN = re.compile(rf"\d\s?([{re.escape(SIGNS)}])\s?(?=[\d(])")
# "one" is mostly a pronoun; "one apple" and "two apples" still differ in "two".
NUMBER_WORDS = frozenset(
    words_of(
        """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen
        half third quarter twice thrice double triple"""
    )
)

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


def fixed_digest(sample: Sample, side: str, plan: BandPlan) -> int:
    """Return 64 bits of BLAKE2b over what near duplicates must share: the numbers of a side, and a short answer."""
    digest = hashlib.blake2b(digest_size=8)
    chosen = sample.chosen(side)
    for index in chosen:
        text, words = sample.turns[index][1], sample.words[index]
        # "don't" is not a word of letters alone either.
        deciding = [word for word in words if not word.isalpha() and "'" not in word]
        if not NUMBER_WORDS.isdisjoint(words):
            deciding += [word for word in words if word in NUMBER_WORDS]
        if deciding and any(sign in text for sign in SIGNS):
            deciding += SIGN.findall(text)
        digest.update(" ".join(deciding).encode() + b"\xff")
    answers = [sample.words[index] for index in chosen if sample.turns[index][0]]
    if sum(map(len, answers)) - plan.words + 1 < plan.fewest:
        digest.update("\n".join(" ".join(words) for words in answers).encode())
    return int.from_bytes(digest.digest(), "little")


def shingles(sample: Sample, side: str, plan: BandPlan) -> NDArray[np.uint32]:
    """Return (S,) sorted distinct 32-bit hashes of the shingles of a side; (0,) if too few for a comparison.

    The lowest bit is 1 for a shingle that begins in a turn of the model.
    """
    chosen = sample.chosen(side)
    asked, answered = ([sample.ids[i] for i in chosen if sample.turns[i][0] is ours] for ours in (False, True))
    ids = np.concatenate([*asked, *answered] or [word_ids([])])
    if len(ids) - plan.words + 1 < plan.fewest:
        return np.empty(0, dtype=np.uint32)
    found = (ngram_hashes(ids, plan.words) >> np.uint64(32)).astype(np.uint32)
    first = sum(map(len, asked))  # the shingle that begins with the model's first word
    found[:first] &= np.uint32(0xFFFFFFFE)
    found[first:] |= np.uint32(1)
    found.sort()
    new = np.empty(len(found), dtype=bool)
    new[0] = True
    np.not_equal(found[1:], found[:-1], out=new[1:])
    found = found[new]
    return found if len(found) >= plan.fewest else found[:0]


def band_keys(sets: Sequence[NDArray[np.uint32]], plan: BandPlan, fixed: Sequence[int]) -> Bands:
    """Return (N, bands) keys of N shingle sets that are not empty; rows of other `fixed` digests get other keys."""
    from rensa import RMinHash

    if not sets:
        return np.empty((0, plan.bands), dtype=np.uint32)
    flat = np.concatenate(sets).astype(np.uint64)
    ends = np.cumsum([0, *(len(one) for one in sets)]).astype(np.uint64)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, plan.bands * plan.rows, SEED)
    hashes = np.array(digests.to_rows(), dtype=np.uint64).reshape(len(sets), plan.bands, plan.rows)
    keys = np.repeat(np.array(fixed, dtype=np.uint64)[:, None], plan.bands, axis=1)
    for place in range(plan.rows):
        keys = (keys + hashes[:, :, place] + np.uint64(1)) * MULTIPLIER
    return (keys >> np.uint64(32)).astype(np.uint32)
