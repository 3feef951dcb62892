"""The pass over single rows: reasons for dropping, and data for the comparison of rows. Runs in worker processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import InputError
from gemma2.posttrain.data.shapes.turns import TurnError
from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.schemas import FilterConfig

from .criteria.contamination import EvaluationTexts
from .criteria.refusals import is_refusal
from .criteria.sample import Sample, sample_of
from .criteria.signatures import band_keys, exact_digest, fixed_digest, plan_bands, shingles
from .criteria.subsets import OVERRIDDEN, Subsets
from .rules import ORDER, active_filters, row_filters

__all__ = ["BAD", "STAYS", "Findings", "Scanner", "code_of"]

STAYS, BAD = 0, 255  # codes of a row; a dropped row has 1 + the place in ORDER of the filter that dropped it

Reasons = list[tuple[str, str]]


def code_of(name: str) -> int:
    """Return the code of a filter."""
    return 1 + ORDER.index(name)


@dataclass
class Findings:
    """Results of the scan of n rows; arrays without a comment on shape are (n,)."""

    codes: NDArray[np.uint8]
    subsets: NDArray[np.uint32]  # bit k: the row belongs to the k-th kept subset
    refuses: NDArray[np.bool_]
    digests: NDArray[np.uint64]  # (n, 2); 0 for a dropped row
    sizes: NDArray[np.uint32]  # number of shingles; 0 for a row that is not compared
    keys: NDArray[np.uint32]  # (rows with shingles, bands)
    shingles: NDArray[np.uint32]  # (sizes.sum(),)
    reasons: dict[int, Reasons] = field(default_factory=dict)  # of dropped and bad rows, by index

    @classmethod
    def empty(cls, rows: int) -> Findings:
        """Return findings of rows that all stay and are not compared."""
        return cls(
            codes=np.zeros(rows, dtype=np.uint8),
            subsets=np.zeros(rows, dtype=np.uint32),
            refuses=np.zeros(rows, dtype=bool),
            digests=np.zeros((rows, 2), dtype=np.uint64),
            sizes=np.zeros(rows, dtype=np.uint32),
            keys=np.zeros((0, 0), dtype=np.uint32),
            shingles=np.zeros(0, dtype=np.uint32),
        )

    def drop(self, index: int, reasons: Reasons) -> None:
        """Drop a row; the first reason counts."""
        self.codes[index] = code_of(reasons[0][0])
        self.reasons[index] = reasons

    def save(self, file: BinaryIO) -> None:
        """Write everything except the shingles to an open file."""
        listed = json.dumps(list(self.reasons.items()), ensure_ascii=False).encode()
        np.savez(
            file,
            codes=self.codes,
            subsets=self.subsets,
            refuses=self.refuses,
            digests=self.digests,
            sizes=self.sizes,
            keys=self.keys,
            reasons=np.frombuffer(listed, dtype=np.uint8),
        )

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Read findings written by `save`; `shingles` is empty."""
        with np.load(path, allow_pickle=False) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
        listed = json.loads(stored.pop("reasons").tobytes())
        reasons = {index: [(name, detail) for name, detail in found] for index, found in listed}
        return cls(**stored, shingles=np.zeros(0, dtype=np.uint32), reasons=reasons)


class Scanner:
    """Judges rows one by one."""

    def __init__(self, config: FilterConfig, evaluation: EvaluationTexts | None) -> None:
        active = active_filters(config)
        self.config = config
        self.filters = row_filters(config, evaluation)
        self.subsets = Subsets(config.keep, config.keep_patterns)
        self.plan = plan_bands(config.near_threshold, config.shingle_words)
        self.compares = "duplicate" in active
        self.compares_nearly = "near-duplicate" in active
        self.counts_refusals = "refusal" in active
        self.checks_turns = "turns" in active
        self.ignored = frozenset(config.ignore_keys)

    def scan(self, rows: Sequence[Row]) -> Findings:
        """Return the findings of one chunk. Raises InputError for a bad row if `on_bad_row` is "error"."""
        found = Findings.empty(len(rows))
        sets: list[tuple[NDArray[np.uint32], int]] = []
        for index, row in enumerate(rows):
            try:
                sample = sample_of(row, self.ignored, self.checks_turns)
            except TurnError as error:
                if self.checks_turns:
                    found.drop(index, [("turns", error.what)])
                else:
                    self._bad(index, error, found)
                continue
            except InputError as error:
                self._bad(index, error, found)
                continue
            self._judge(index, sample, found)
            if found.codes[index] == STAYS:
                self._describe(index, sample, found, sets)
        found.keys = band_keys([one for one, _ in sets], self.plan, [fixed for _, fixed in sets])
        found.shingles = np.concatenate([one for one, _ in sets]) if sets else found.shingles
        return found

    def _bad(self, index: int, error: InputError, found: Findings) -> None:
        if self.config.on_bad_row == "error":
            raise error
        found.codes[index] = BAD
        found.reasons[index] = [("bad row", str(error))]

    def _judge(self, index: int, sample: Sample, found: Findings) -> None:
        subsets = self.subsets.of(sample) if self.subsets.names else []
        found.subsets[index] = sum(1 << self.subsets.names.index(name) for name in subsets)
        reasons = []
        for name, judge in self.filters.items():
            detail = None if subsets and name in OVERRIDDEN else judge(sample)
            if detail is not None:
                reasons.append((name, detail))
                if not self.config.all_reasons:
                    break
        if reasons:
            found.drop(index, reasons)

    def _describe(
        self, index: int, sample: Sample, found: Findings, sets: list[tuple[NDArray[np.uint32], int]]
    ) -> None:
        """Record the digest, shingles and refusal of a row that stays so far, for the comparison of rows."""
        side = self.config.dedup_on
        if self.compares:
            found.digests[index] = np.frombuffer(exact_digest(sample, side), dtype=np.uint64)
        if self.compares_nearly:
            mine = shingles(sample, side, self.plan)
            found.sizes[index] = len(mine)
            if len(mine):
                sets.append((mine, fixed_digest(sample, side, self.plan)))
        if self.counts_refusals:
            found.refuses[index] = is_refusal(sample)
