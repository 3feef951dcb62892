"""The last pass: write kept rows to shards, dropped ones with their reasons to dropped.jsonl, and count them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.progress import Progress
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.sources import ShardWriter, to_line
from gemma2.posttrain.schemas import FilterConfig

from .chunks import ChunkStore
from .criteria.subsets import Subsets
from .decide import Decisions
from .rules import ORDER, active_filters
from .scan import BAD, STAYS, Reasons, code_of

__all__ = ["DROPPED", "summary_of", "write_rows"]

DROPPED = "dropped.jsonl"
ADVANCE = 1024  # rows between two updates of the progress bar


def write_rows(
    directory: Path,
    config: FilterConfig,
    reading: Reading,
    store: ChunkStore,
    decisions: Decisions,
    progress: Progress,
) -> None:
    """Write every row to the shards or to dropped.jsonl; rows that are not conversations are skipped."""
    places: dict[int, str] = {}  # "file:line" of the rows that others repeat
    repeated = set(decisions.original[decisions.original >= 0].tolist())
    rows = reading.rows(config.data)
    codes = decisions.codes.tolist()
    with (
        ShardWriter(directory, config.shard_rows) as kept,
        (directory / DROPPED).open("wb") as dropped,
        progress.task("write", total=len(codes), unit="rows") as task,
    ):
        for index, (row, code, found) in enumerate(zip(rows, codes, _reasons(store), strict=True)):
            if code == STAYS:
                kept.write(row.columns)
            elif code == BAD:
                reading.skip(InputError(found[0][1], ""), row.where, row.columns)
            else:
                reasons = found or [(ORDER[code - 1], _comparison(decisions, index, places))]
                dropped.write(to_line(_with_reasons(row.columns, reasons, config.all_reasons)))
            if index in repeated:
                places[index] = Path(row.where).name
            if (index + 1) % ADVANCE == 0:
                task.advance(ADVANCE)
        task.advance(len(codes) % ADVANCE)


def summary_of(config: FilterConfig, decisions: Decisions, bad: int) -> JsonObject:
    """Return counts of rows: read, kept, dropped by every active filter, kept of every subset."""
    counts = np.bincount(decisions.codes, minlength=BAD + 1)
    stays = decisions.codes == STAYS
    rows = len(decisions.codes) - int(counts[BAD])
    names = Subsets(config.keep, config.keep_patterns).names
    subsets = {name: int(np.count_nonzero(decisions.subsets[stays] >> k & 1)) for k, name in enumerate(names)}
    summary: JsonObject = {
        "rows": rows,
        "kept": int(counts[STAYS]),
        "share": round(int(counts[STAYS]) / rows, 6) if rows else 0.0,
        "bad_rows": bad,
        "dropped": {name: int(counts[code_of(name)]) for name in active_filters(config)},
    }
    if subsets:
        summary["kept_subsets"] = subsets
    if "refusal" in summary["dropped"]:
        summary["kept_refusals"] = int(np.count_nonzero(decisions.refuses[stays]))
    return summary


def _reasons(store: ChunkStore) -> Iterator[Reasons]:
    """Yield the reasons why the scan dropped each row, an empty list for a row that it left."""
    for findings in store:
        yield from (findings.reasons.get(index, []) for index in range(len(findings.codes)))


def _comparison(decisions: Decisions, index: int, places: Mapping[int, str]) -> str:
    original = int(decisions.original[index])
    if original < 0:
        return "more refusals than --max-refusal-share"
    if decisions.similarity[index] == 0:
        return f"the same as {places[original]}"
    return f"{decisions.similarity[index]:.2f} like {places[original]}"


def _with_reasons(columns: JsonMapping, reasons: Reasons, every: bool) -> JsonObject:
    """Return a dropped row with its first reason; the row's own columns of these names get the suffix `_of_row`."""
    ours: JsonObject = {"reason": reasons[0][0], "detail": reasons[0][1]}
    if every:
        ours["reasons"] = [{"reason": name, "detail": detail} for name, detail in reasons]
    theirs = {f"{name}_of_row" if name in ours else name: value for name, value in columns.items()}
    return theirs | ours
