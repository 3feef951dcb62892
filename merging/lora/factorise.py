"""The best low-rank factors of one matrix: D ~ left @ right, with the singular values shared equally between the two.

Two methods, both with measured and not estimated errors (`extraction` computes |D - left @ right| from what it stores):

exact       D = U S V^T from the eigenvectors of the smaller Gram matrix, in fp64. Among all matrices of rank R, the
            first R singular triples have the least error (Eckart and Young 1936): sqrt(sum of the other S^2).
            Squaring costs digits of singular values below 1e-8 of the largest one: they are dropped as zero.
randomised  subspace iteration, Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4, with PASSES iterations and
            OVERSAMPLED extra columns, then algorithm 5.1. On a matrix of noise, the worst case, its error is 0.2 %
            above the least one (9216 x 2304, rank 32); on a decaying spectrum it is the least one to rounding.

Exact factors of a 9216 x 2304 matrix took 22 s, randomised ones 2 to 4 s (docs/log.md): these need a product of the
matrix with R + OVERSAMPLED columns per pass. They are taken if that is at most an eighth of the smaller side, and the
rank is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemma2.merging.kernels.number_formats import Doubles, Floats

__all__ = ["LowRankFactors", "Svd", "factorise"]

Svd = Literal["exact", "randomised"]

ROWS = 1024  # rows or columns of D that are widened to fp64 at a time
PASSES = 3
OVERSAMPLED = 8
SHARE_OF_SIDE = 8
ZERO = 1e-8  # of the largest singular value


@dataclass(frozen=True)
class LowRankFactors:
    """left (m, R) and right (R, n), fp64, with R at most the requested rank; `svd` names the method."""

    left: Doubles
    right: Doubles
    svd: Svd

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return len(self.right)


def factorise(matrix: Floats, rank: int | None, explained: float | None, svd: Svd | None = None) -> LowRankFactors:
    """Return the factors of the smallest rank, up to `rank`, that hold the share `explained` of the squared norm.

    matrix     (m, n) fp32, finite, not zero
    rank       None: as many as `explained` needs
    explained  None: exactly `rank`, or the number of singular values that are not zero
    svd        None: the cheaper method that can answer
    """
    side = min(matrix.shape)
    most = min(rank or side, side)
    if svd is None:
        cheap = explained is None and (most + OVERSAMPLED) * SHARE_OF_SIDE <= side
        svd = "randomised" if cheap else "exact"
    left, values, right = _randomised(matrix, most) if svd == "randomised" else _exact(matrix, most)
    kept = int((values > ZERO * values[0]).sum())
    if explained is not None:
        total = float(np.square(matrix, dtype=np.float64).sum())
        held = np.cumsum(values[:kept] ** 2)
        # All of them hold everything but for rounding.
        kept = min(kept, int(np.searchsorted(held, min(explained * total, held[-1]))) + 1)
    root = np.sqrt(values[:kept])
    return LowRankFactors(left[:, :kept] * root, root[:, None] * right[:kept], svd)


Triples = tuple[Doubles, Doubles, Doubles]  # left vectors (m, K), singular values (K,) descending, right vectors (K, n)


def _exact(matrix: Floats, most: int) -> Triples:
    """Return the first `most` singular triples, from the Gram matrix of the smaller side."""
    tall = matrix.shape[0] >= matrix.shape[1]
    thin = matrix if tall else matrix.T
    side = thin.shape[1]
    gram = np.zeros((side, side))
    for begin in range(0, len(thin), ROWS):
        rows = thin[begin : begin + ROWS].astype(np.float64)
        gram += rows.T @ rows
    squares, vectors = np.linalg.eigh(gram)
    values = np.sqrt(np.maximum(squares[::-1][:most], 0))
    inner = vectors[:, ::-1][:, :most]
    outer = np.concatenate([thin[at : at + ROWS].astype(np.float64) @ inner for at in range(0, len(thin), ROWS)])
    outer /= np.where(values > ZERO * values[0], values, 1)
    return (outer, values, inner.T) if tall else (inner, values, outer.T)


def _randomised(matrix: Floats, most: int) -> Triples:
    """Return approximations of the first `most` singular triples. The same matrix gives the same ones."""
    columns = min(most + OVERSAMPLED, *matrix.shape)
    span = np.random.default_rng(0).standard_normal((matrix.shape[1], columns), dtype=np.float32)
    basis: Floats = np.linalg.qr(matrix @ span)[0]
    for _ in range(PASSES):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    inner, values, right = np.linalg.svd((basis.T @ matrix).astype(np.float64), full_matrices=False)
    return (basis @ inner)[:, :most], values[:most], right[:most]
