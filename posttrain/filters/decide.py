"""The decisions that need all rows: duplicates, near duplicates, the cap on refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2.posttrain.schemas import FilterConfig

from .chunks import ChunkStore
from .criteria.signatures import BandPlan, plan_bands
from .rules import active_filters
from .scan import STAYS, code_of

__all__ = ["Decisions", "decide", "surplus_refusals"]


@dataclass
class Decisions:
    """The decisions on N rows: `codes` as in `Findings`; for a repeated row the row that stays and their similarity."""

    codes: NDArray[np.uint8]
    subsets: NDArray[np.uint32]
    refuses: NDArray[np.bool_]
    original: NDArray[np.int64]  # (N,) index of the row that a dropped one repeats, -1 for none
    similarity: NDArray[np.float64]


def decide(store: ChunkStore, config: FilterConfig) -> Decisions:
    """Decide on all rows, in input order, from what the scan left. One column of findings is in memory at a time."""
    active = active_filters(config)
    codes = store.column("codes")
    decisions = Decisions(
        codes,
        subsets=store.column("subsets"),
        refuses=store.column("refuses"),
        original=np.full(len(codes), -1, dtype=np.int64),
        similarity=np.zeros(len(codes)),
    )
    if "duplicate" in active:
        _drop_exact(decisions, store.column("digests"))
    if "near-duplicate" in active:
        _drop_near(decisions, store, plan_bands(config.near_threshold, config.shingle_words))
    if config.max_refusal_share is not None and "refusal" in active:
        alive = np.flatnonzero(decisions.codes == STAYS)
        surplus = surplus_refusals(
            decisions.refuses[alive], decisions.subsets[alive] != 0, config.max_refusal_share, config.seed
        )
        decisions.codes[alive[surplus]] = code_of("refusal")
    return decisions


def _drop_exact(decisions: Decisions, digests: NDArray[np.uint64]) -> None:
    from .criteria.duplicates import exact_duplicates

    alive = np.flatnonzero(decisions.codes == STAYS)
    first = exact_duplicates(digests[alive])
    repeated = first >= 0
    decisions.codes[alive[repeated]] = code_of("duplicate")
    decisions.original[alive[repeated]] = alive[first[repeated]]


def _drop_near(decisions: Decisions, store: ChunkStore, plan: BandPlan) -> None:
    from .criteria.duplicates import link_bands, near_duplicates

    sizes = store.column("sizes")
    compared = np.flatnonzero(sizes)  # the rows that have a line in `keys`
    still = decisions.codes[compared] == STAYS
    if not still.any():
        return
    rows, ends = compared[still], np.cumsum(sizes[compared], dtype=np.int64)
    spans = np.stack([ends - sizes[compared], ends], axis=1)[still]
    links = link_bands(store.column("keys")[still])
    repeats, similarity = near_duplicates(links, spans, store.shingles(), plan.threshold, plan.fewest)
    dropped = repeats >= 0
    decisions.codes[rows[dropped]] = code_of("near-duplicate")
    decisions.original[rows[dropped]] = rows[repeats[dropped]]
    decisions.similarity[rows[dropped]] = similarity[dropped]


def surplus_refusals(
    refuses: NDArray[np.bool_], protected: NDArray[np.bool_], share: float, seed: int
) -> NDArray[np.intp]:
    """Return indices of the refusals to drop, so that refusals are at most `share` of the rows that stay.

    With A answers, r refusals may stay: r / (A + r) <= share, so r = floor(share A / (1 - share)). The refusals to drop
    are drawn with `seed`; `protected` ones stay and count as refusals.
    """
    answers = int(np.count_nonzero(~refuses))
    allowed = math.floor(share * answers / (1 - share) + 1e-9)
    droppable = np.flatnonzero(refuses & ~protected)
    surplus = min(len(droppable), max(int(np.count_nonzero(refuses)) - allowed, 0))
    drawn = np.random.default_rng(seed).permutation(droppable)[:surplus]
    return np.sort(drawn)
