"""Exact and near duplicates among all rows that passed the other filters: the first of them stays.

A row is a near duplicate if its Jaccard similarity to an earlier row *that stays* reaches the threshold, and so does
the similarity of the two answers alone where both are long enough for a comparison. The bands yield candidates, the
similarity is computed from the shingles. A row is compared to at most CANDIDATES rows, the latest first. Memory: 4
bytes per band and row; the shingles stay on disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma2.merging.kernels.native import compiled

from .signatures import Bands

__all__ = ["exact_duplicates", "link_bands", "near_duplicates"]

CANDIDATES = 256

Shingles = NDArray[np.uint32]


def exact_duplicates(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return (N,) index of the first row with the same digest, -1 for the first itself. digests: (N, 2) halves."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    same = np.zeros(len(digests), dtype=bool)
    same[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(digests))))
    first = np.full(len(digests), -1, dtype=np.int64)
    first[order[same]] = order[starts[same]]
    return first


def link_bands(keys: Bands) -> NDArray[np.int32]:
    """Return (N, bands) int32 index of the latest earlier row with the same key in that band, or -1.

    In place: the result uses the memory of `keys`.
    """
    links = keys.view(np.int32)
    for band in range(keys.shape[1]):
        column = keys[:, band].copy()
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        earlier = np.full(len(column), -1, dtype=np.int32)
        same = ordered[1:] == ordered[:-1]
        earlier[order[1:][same]] = order[:-1][same]
        links[:, band] = earlier
    return links


@compiled()
def similarity(a: Shingles, b: Shingles, fewest: int) -> float:
    """Return the Jaccard similarity of two sorted arrays of distinct numbers.

    If both have at least `fewest` odd numbers (shingles of answers), return the smaller one of it and of their
    similarity in odd numbers.
    """
    i, j, shared, shared_odd, odd_a, odd_b = 0, 0, 0, 0, 0, 0
    while i < a.size and j < b.size:
        if a[i] == b[j]:
            shared += 1
            shared_odd += a[i] & 1
            i, j = i + 1, j + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    value = shared / (a.size + b.size - shared)
    for number in a:
        odd_a += number & 1
    for number in b:
        odd_b += number & 1
    if min(odd_a, odd_b) >= fewest:
        value = min(value, shared_odd / (odd_a + odd_b - shared_odd))
    return value


@compiled()
def near_duplicates(
    links: NDArray[np.int32], spans: NDArray[np.int64], shingles: Shingles, threshold: float, fewest: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the rows that nearly repeat an earlier row that stays.

    links: (N, bands) from `link_bands`, changed in place. spans: (N, 2), row i has the sorted shingles
    [spans[i, 0], spans[i, 1]). fewest: shingles of an answer that is compared by itself.

    Returns (N,) the earlier row or -1, and (N,) their similarity.
    """
    rows, bands = links.shape
    repeats = np.full(rows, -1, np.int64)
    found = np.zeros(rows)
    compared_to = np.full(rows, -1, np.int64)
    for i in range(rows):
        for band in range(bands):  # skip dropped rows, once: afterwards every link leads to a row that stays
            j = links[i, band]
            while j >= 0 and repeats[j] >= 0:
                j = links[j, band]
            links[i, band] = j
        mine = shingles[spans[i, 0] : spans[i, 1]]
        compared = 0
        for band in range(bands):
            j = links[i, band]
            while j >= 0 and repeats[i] < 0 and compared < CANDIDATES:
                size = spans[j, 1] - spans[j, 0]
                # size of the smaller set / size of the larger set bounds the similarity.
                if compared_to[j] != i and min(size, mine.size) >= threshold * max(size, mine.size):
                    compared_to[j] = i
                    compared += 1
                    value = similarity(mine, shingles[spans[j, 0] : spans[j, 1]], fewest)
                    if value >= threshold:
                        repeats[i], found[i] = j, value
                j = links[j, band]
            if repeats[i] >= 0:
                break
    return repeats, found
