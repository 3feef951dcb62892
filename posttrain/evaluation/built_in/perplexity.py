"""Perplexity of texts by one model, or by two and their difference (`windows.py` has the definitions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import GuardStop, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import Ranks
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.sources import no_rows
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import quiet_libraries
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import length_batches
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures.built_in import PerplexityConfig

from .documents import documents_of
from .keeping import Kept, MeasureOutcome, as_document, keeping, task_names
from .loaded import context_of, loaded, models_of, settle_kernel
from .prompting import bos_of, ids_hash, text_ids
from .windows import Span, Totals, perplexity_figures, windows_of

__all__ = ["run_perplexity"]

PART = 8  # batches of windows between two flushes of the journal
DIGITS = 6  # of nats, after the point
ALL = "all"  # the task of several files together


@dataclass(frozen=True)
class TokenisedText:
    """A document as tokens."""

    ids: list[int]
    totals: Totals


@dataclass(frozen=True)
class TextWindow:
    """One window of a document, as the model reads it: `given` and then the tokens that are counted."""

    document: int
    span: Span
    given: list[int]
    counted: list[int]


@dataclass(frozen=True)
class FileWindows:
    """The windows of one file, and the size of its text."""

    rows: list[JsonObject]
    totals: Totals
    documents: int


def run_perplexity(config: PerplexityConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Measure `config.model`, and `config.against`, on every file of `config.perplexity`."""
    quiet_libraries()
    with keeping("eval perplexity", config, options) as kept:
        progress = progress if kept.ranks.is_main else SILENT
        reading = Reading(config)
        names = task_names(config.perplexity)
        outcomes = []
        settle_kernel(config, kept.run, progress)
        for number, path in enumerate(models_of(config)):
            model, tokenizer = loaded(path, config.dtype, config.attention)
            size = window_size(config, model)
            measure = _Measure(config, kept, reading, number, size)
            found = {
                name: measure.file(name, file, model, tokenizer, progress)
                for name, file in zip(names, config.perplexity, strict=True)
            }
            outcomes.append(_outcome(found, size, config.overlap))
        return as_document(kept, config, outcomes, reading, progress)


def window_size(config: PerplexityConfig, model: CausalLM) -> int:
    """Tokens of a window, the <bos> included. Raises UsageError for a window that the model cannot see."""
    longest = context_of(model)
    size = config.window or longest
    if size is None:
        raise UsageError("the model states no context", "give --window")
    if longest is not None and size > longest:
        raise UsageError(f"--window {size} is longer than the model's context of {longest}", "give a shorter window")
    if config.overlap > size - 2:
        raise UsageError(f"--overlap {config.overlap} leaves no token to count in a window of {size}", "lower it")
    return size


@dataclass(frozen=True)
class _Measure:
    """The measurement of one model."""

    config: PerplexityConfig
    kept: Kept
    reading: Reading
    number: int  # 0: the model, 1: the one that it is compared with
    size: int

    def file(self, name: str, path: Path, model: CausalLM, tokenizer: Tokenizer, progress: Progress) -> FileWindows:
        """The windows of one file, those of an interrupted run taken from its journal."""
        texts = [_text(tokenizer, text) for text in documents_of(path, self.reading, self.config.limit)]
        if not texts:
            raise no_rows(path)
        bos = bos_of(tokenizer)
        windows = [
            TextWindow(i, span, [bos, *text.ids[span.context : span.start]], text.ids[span.start : span.end])
            for i, text in enumerate(texts)
            for span in windows_of(len(text.ids), self.size, self.config.overlap)
        ]
        part = PART * self.config.batch_size
        with progress.task(f"perplexity of {name}", total=sum(len(w.counted) for w in windows), unit="tokens") as bar:
            for start in range(0, len(windows), part):
                chunk = windows[start : start + part]
                keys = [(self.number, name, start + i) for i in range(len(chunk))]
                if not all(key in self.kept for key in keys):
                    nats = _nats(model, chunk, self.config.batch_size, self.kept.ranks)
                    self.kept.add({"key": key, "nats": value} for key, value in zip(keys, nats, strict=True))
                bar.advance(sum(len(window.counted) for window in chunk))
        rows = [
            {
                "id": i,
                "document": window.document,
                "first_token": window.span.start,
                "tokens": len(window.counted),
                "nats": self.kept[self.number, name, i]["nats"],
                "prompt_ids_hash": ids_hash([*window.given, *window.counted]),
            }
            for i, window in enumerate(windows)
        ]
        totals = Totals(sum(text.totals.words for text in texts), sum(text.totals.bytes for text in texts))
        return FileWindows(rows, totals, len(texts))


def _text(tokenizer: Tokenizer, text: str) -> TokenisedText:
    return TokenisedText(text_ids(tokenizer, text), Totals(len(text.split()), len(text.encode())))


def _nats(model: CausalLM, windows: Sequence[TextWindow], batch_size: int, ranks: Ranks) -> list[float]:
    """Minus the log-prob of what each window counts; the processes are dealt the batches."""
    batches = list(length_batches([len(window.given) + len(window.counted) for window in windows], batch_size))

    def of_batch(batch: list[int]) -> list[float]:
        given, counted = [windows[i].given for i in batch], [windows[i].counted for i in batch]
        return [-float(logps.double().sum()) for logps in token_logps(model, given, counted, batch_size)]

    found = [0.0] * len(windows)
    for batch, values in zip(batches, ranks.dealt(batches, of_batch), strict=True):
        for i, value in zip(batch, values, strict=True):
            found[i] = value
    wrong = next((value for value in found if not abs(value) < float("inf")), None)
    if wrong is not None:
        raise GuardStop(f"the log-probability of a window is {wrong}", "check the weights: gemma2 doctor MODEL")
    return [round(value, DIGITS) for value in found]


def _outcome(found: dict[str, FileWindows], size: int, overlap: int) -> MeasureOutcome:
    if len(found) > 1:
        every = found.values()
        totals = Totals(sum(f.totals.words for f in every), sum(f.totals.bytes for f in every))
        rows = [row for f in every for row in f.rows]
        found = found | {ALL: FileWindows(rows, totals, sum(f.documents for f in every))}
    tasks = {name: _task(measured, size, overlap) for name, measured in found.items()}
    return MeasureOutcome(tasks, {name: found[name].rows for name in found if name != ALL or len(found) == 1})


def _task(measured: FileWindows, size: int, overlap: int) -> JsonObject:
    nats = [row["nats"] for row in measured.rows]
    tokens = [row["tokens"] for row in measured.rows]
    figures = perplexity_figures(nats, tokens, measured.totals)
    counts = {"tokens": sum(tokens), "words": measured.totals.words, "bytes": measured.totals.bytes}
    return {
        "n": len(tokens),
        "unit": "windows",
        **figures,
        **counts,
        "documents": measured.documents,
        "window": size,
        "overlap": overlap,
    }
