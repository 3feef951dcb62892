"""`gemma2 filter`: select the rows that a model should learn from (Gemma 2 report, section 4, and common practice).

Three passes. Scan: every row is judged by itself, in chunks, by several processes; the findings are saved chunk by
chunk, and a resumed run continues after the last one. Decide: rows are compared, in input order. Write: the input is
read again, kept rows go to shards, dropped ones to `dropped.jsonl` with their reason. Order and columns are kept.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.sources import count_rows
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import FilterConfig

from .chunks import ChunkStore
from .criteria.contamination import EvaluationTexts, read_evaluation
from .decide import decide
from .pool import Rows, scanned
from .rules import active_filters, check_settings
from .scan import Scanner
from .write import summary_of, write_rows

if TYPE_CHECKING:
    from .safety import SafetyModel

__all__ = ["run_filter"]

CHUNK = 2048  # rows between two saves


def run_filter(config: FilterConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Write the rows of `config.data` that pass, in shards, and `dropped.jsonl`, to `options.out`.

    Raises UsageError for filters that are not set up, InputError for unusable rows or evaluation sets.
    """
    active = active_filters(config)
    check_settings(config)
    with open_run("filter", config, options) as run:
        evaluation = None
        if "contaminated" in active:
            evaluation = read_evaluation(config.decontaminate, config.decontaminate_ngram)
        Scanner(config, evaluation)  # reports errors of the settings before the first row
        judge = _safety_model(config) if config.safety_model and "unsafe" in active else None
        store = ChunkStore(run.checkpoints)
        reading = Reading(config)
        _scan(config, reading, evaluation, judge, store, progress)
        if not store.done:
            what = f"no row of {config.data} can be read; the first: {reading.first_error()}"
            raise InputError(what, "fix the file")
        decisions = decide(store, config)
        write_rows(run.path, config, reading, store, decisions, progress)
        unread = reading.report(progress, run.path)
        summary = summary_of(config, decisions, unread.pop("skipped_rows", 0))
        if not summary["kept"]:
            progress.warn(f"all {summary['rows']} rows were dropped; see the reasons in dropped.jsonl")
        return run.finish(summary | unread)


def _scan(
    config: FilterConfig,
    reading: Reading,
    evaluation: EvaluationTexts | None,
    judge: SafetyModel | None,
    store: ChunkStore,
    progress: Progress,
) -> None:
    """Scan the rows that are not scanned yet."""
    total = count_rows(config.data)
    rows = reading.rows(config.data)
    chunks: Iterator[Rows] = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    workers = min(config.workers or os.cpu_count() or 1, -(-total // CHUNK))
    with progress.task("filter", total=total, unit="rows") as task:
        for chunk in itertools.islice(chunks, store.done):
            task.advance(len(chunk))
        for chunk, findings in scanned(chunks, config, evaluation, workers):
            if judge is not None:
                judge.drop_unsafe(chunk, findings)
            store.append(findings)
            task.advance(len(chunk))


def _safety_model(config: FilterConfig) -> SafetyModel:
    from .safety import SafetyModel  # imports torch, which the other filters do not need

    return SafetyModel.load(config)
