"""The decisions that need all rows: duplicates, near duplicates, the cap on refusals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2.posttrain.schemas import FilterConfig

from .chunks import ChunkStore
from .refusals import surplus_refusals
from .rules import active_filters
from .scan import STAYS, Findings, code_of

__all__ = ["Decisions", "decide"]


@dataclass
class Decisions:
    """The fate of N rows: `codes` as in `Findings`; for repeated rows the row that stays and how similar it is."""

    codes: NDArray[np.uint8]
    subsets: NDArray[np.uint32]
    refuses: NDArray[np.bool_]
    original: NDArray[np.int64]  # (N,) index of the row that a dropped one repeats, -1 for none
    similarity: NDArray[np.float64]


def decide(store: ChunkStore, config: FilterConfig) -> Decisions:
    """Compare the rows that the scan left, in input order."""
    chunks = list(store)
    decisions = _gather(chunks)
    active = active_filters(config)
    if "duplicate" in active:
        _drop_exact(decisions, np.concatenate([chunk.digests for chunk in chunks]))
    if "near-duplicate" in active:
        sizes = np.concatenate([chunk.sizes for chunk in chunks])
        keys = np.concatenate([chunk.keys for chunk in chunks if len(chunk.keys)] or [chunks[0].keys])
        chunks.clear()
        _drop_near(decisions, sizes, keys, store.shingles(), config.near_threshold)
    if config.max_refusal_share is not None and "refusal" in active:
        alive = np.flatnonzero(decisions.codes == STAYS)
        surplus = surplus_refusals(
            decisions.refuses[alive], decisions.subsets[alive] != 0, config.max_refusal_share, config.seed
        )
        decisions.codes[alive[surplus]] = code_of("refusal")
    return decisions


def _gather(chunks: list[Findings]) -> Decisions:
    codes = np.concatenate([chunk.codes for chunk in chunks])
    return Decisions(
        codes=codes,
        subsets=np.concatenate([chunk.subsets for chunk in chunks]),
        refuses=np.concatenate([chunk.refuses for chunk in chunks]),
        original=np.full(len(codes), -1, dtype=np.int64),
        similarity=np.zeros(len(codes)),
    )


def _drop_exact(decisions: Decisions, digests: NDArray[np.uint64]) -> None:
    from .duplicates import exact_duplicates

    alive = np.flatnonzero(decisions.codes == STAYS)
    first = exact_duplicates(digests[alive])
    repeated = first >= 0
    decisions.codes[alive[repeated]] = code_of("duplicate")
    decisions.original[alive[repeated]] = alive[first[repeated]]


def _drop_near(
    decisions: Decisions,
    sizes: NDArray[np.uint32],
    keys: NDArray[np.uint32],
    shingles: NDArray[np.uint32],
    threshold: float,
) -> None:
    from .duplicates import link_bands, near_duplicates

    compared = np.flatnonzero(sizes)  # the rows that `keys` has a line for
    still = decisions.codes[compared] == STAYS
    if not still.any():
        return
    starts = np.concatenate([[0], np.cumsum(sizes[compared], dtype=np.int64)])
    rows = compared[still]
    spans = np.stack([starts[:-1][still], starts[1:][still]], axis=1)
    repeats, similarity = near_duplicates(link_bands(keys[still]), spans, shingles, threshold)
    dropped = repeats >= 0
    decisions.codes[rows[dropped]] = code_of("near-duplicate")
    decisions.original[rows[dropped]] = rows[repeats[dropped]]
    decisions.similarity[rows[dropped]] = similarity[dropped]
