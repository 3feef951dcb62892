"""The results that `gemma2 eval` keeps, read from disk, and the comparison of two of them, task by task.

    results.json            figures by task         samples/TASK.jsonl    one line per row

A task is compared by its own metric, the one that its table shows first. Texts (perplexity) are compared in nats per
token, window by window, weighted by tokens; less is better there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.provenance.named_inputs import holds_results

from .against import Scored, compare_scored

__all__ = ["compare_results", "is_result", "read_result", "samples_of", "task_comparison"]

RESULTS, SAMPLES = "results.json", "samples"
NATS = "nats_per_token"
MADE_BY = "give an --out of gemma2 eval"


def is_result(path: Path) -> bool:
    """Whether a path is a directory with results of `gemma2 eval`."""
    return holds_results(path)


def read_result(directory: Path) -> JsonObject:
    """results.json of a finished result. Raises InputError."""
    if not is_result(directory):
        raise InputError(f"{directory} has no {RESULTS}", MADE_BY)
    if (read_manifest(directory) or {}).get("status") != "complete":
        raise InputError(
            f"{directory} is not a finished result: it has no complete gemma2.json", "resume it, or start over"
        )
    document = read_json(directory / RESULTS, MADE_BY)
    tasks = document.get("tasks")
    if not isinstance(tasks, dict) or not all(
        isinstance(found, dict) and found.get("metrics") for found in tasks.values()
    ):
        raise InputError(f"{directory / RESULTS} has no figures of tasks", MADE_BY)
    return document


def samples_of(directory: Path, task: str) -> Iterator[JsonObject]:
    """The rows of a task. Raises InputError if they are missing or cannot be read."""
    path = directory / SAMPLES / f"{task}.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing: the rows are needed to compare them one by one", MADE_BY)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number} is not JSON", "restore the file") from error
            if not isinstance(row, dict) or "id" not in row:
                raise InputError(f"{path}:{number} is not a row of a result", MADE_BY)
            yield row


def compare_results(ours: Path, theirs: Path) -> JsonObject:
    """{"against", "compared": task -> comparison, "not_compared": tasks that only one has}. Raises InputError."""
    here, there = read_result(ours), read_result(theirs)
    common = [name for name in here["tasks"] if name in there["tasks"]]
    if not common:
        names = [", ".join(document["tasks"]) for document in (here, there)]
        raise InputError(
            f"{ours} and {theirs} have no task in common ({names[0]}; {names[1]})", "compare results of the same tasks"
        )
    return {
        "against": there["model"],
        "compared": {
            name: task_comparison(name, here["tasks"][name], [*samples_of(ours, name)], [*samples_of(theirs, name)])
            for name in common
        },
        "not_compared": sorted(here["tasks"].keys() ^ there["tasks"].keys()),
    }


def task_comparison(
    name: str, found: JsonMapping, ours: Sequence[JsonMapping], theirs: Sequence[JsonMapping]
) -> JsonObject:
    """The comparison of one task, with its `metric`, and whether `higher_is_better`. Raises InputError."""
    if ours and "nats" in ours[0]:
        return _texts(name, ours, theirs)
    metric = str(found.get("metric") or next(iter(found["metrics"])))
    compared = compare_scored(Scored.of(ours, metric), Scored.of(theirs, metric), name)
    return {"metric": metric, "higher_is_better": True, **compared}


def _texts(name: str, ours: Sequence[JsonMapping], theirs: Sequence[JsonMapping]) -> JsonObject:
    lengths = {str(row["id"]): float(row["tokens"]) for row in ours}
    if any(lengths.get(str(row["id"]), row["tokens"]) != row["tokens"] for row in theirs):
        raise InputError(
            f"{name}: the two models cut the text into other tokens or windows, so they have no window in common",
            "compare the bits per byte of the two results",
        )
    mine, other = (_nats(rows) for rows in (ours, theirs))
    return {"metric": NATS, "higher_is_better": False, **compare_scored(mine, other, name, lengths)}


def _nats(rows: Sequence[JsonMapping]) -> Scored:
    return Scored.of([{**row, NATS: row["nats"] / row["tokens"]} for row in rows if row["tokens"]], NATS)
