"""`gemma2 eval --suite`: every row asked, graded and kept, so that an interrupted run continues at its next row.

A row's result is written to a journal in `checkpoints/` as soon as its batch is done; samples and results are made of
the journals at the end. A run that was killed at any point and continued gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.manifest import metadata_version
from gemma2.core.progress import SILENT, Progress
from gemma2.core.progress import Task as Bar
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.generation.journal import Journal
from gemma2.posttrain.models.loading import quiet_libraries
from gemma2.posttrain.runs.inputs import model_name
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas.measures import SuiteConfig

from .chat_choice import uses_chat
from .encoding import Encoder, TokenRequest, chat_text, hash_of
from .engines import SuiteEngine, open_engine
from .grading import grade_choices, grade_text
from .prompts import Asked, asked_of
from .results import VERSION, task_result, write_results
from .suite_plan import check_engine, check_model, tables_of
from .task_rows import TaskRows

__all__ = ["run_suite"]

BLOCK = 256  # rows of a group that are encoded at once, and share what they begin with
SAMPLES = "samples"


def run_suite(config: SuiteConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Measure `config.model`; results and samples in `options.out`.

    Raises InputError for rows that do not fit their task and for a broken model, UsageError for a missing engine.
    """
    check_engine(config)
    check_model(config)
    tables = tables_of(config)
    quiet_libraries()
    with open_run("eval suite", config, options) as run:
        run.checkpoints.mkdir(exist_ok=True)
        with_chat = uses_chat(config.model, config.chat)
        run.phase = "loading of the model"
        engine, encoder, facts = open_engine(config)
        document: JsonObject = {
            "version": VERSION,
            "gemma2": metadata_version(),
            "model": _model(run, config, facts),
            "suite": config.suite,
            "settings": _settings(config, with_chat),
            "tasks": {},
        }
        for rows in tables:
            run.phase = rows.task.task
            work = _TaskRun(config, rows, engine, encoder, with_chat)
            with Journal(run.checkpoints / f"{rows.task.task}.jsonl") as journal:
                with progress.task(rows.task.title, len(rows.evaluated), "rows") as bar:
                    work.run(journal, bar)
                samples = [*journal.records()]
            _write_samples(run.path / SAMPLES / f"{rows.task.task}.jsonl", samples)
            document["tasks"][rows.task.task] = found = task_result(rows, samples)
            for note in found["notes"]:
                progress.note(f"{rows.task.title}: {note}")
        write_results(run.path, document)
        return run.finish(_summary(document))


def _model(run: Run, config: SuiteConfig, facts: JsonObject) -> JsonObject:
    weights = next(parent["weights"] for parent in run.origin["parents"] if parent["role"] == "model")
    return {"name": model_name(config.model), "weights": weights, **facts}


def _settings(config: SuiteConfig, with_chat: bool) -> JsonObject:
    found: JsonObject = config.model_dump(mode="json", include={"limit", "max_new_tokens", "batch_size", "seed"})
    style = ("turns" if config.fewshot_as_multiturn else "one user turn") if with_chat else "text"
    return {**found, "chat": with_chat, "fewshot_as": style}


def _summary(document: JsonObject) -> JsonObject:
    return {name: round(found["metrics"][found["metric"]], 4) for name, found in document["tasks"].items()}


class _TaskRun:
    """One task: its rows in blocks, each encoded, run and graded."""

    def __init__(
        self, config: SuiteConfig, rows: TaskRows, engine: SuiteEngine, encoder: Encoder, with_chat: bool
    ) -> None:
        self.config, self.rows, self.engine, self.encoder = config, rows, engine, encoder
        self.chat = chat_text(ChatFormat(encoder.tokenizer)) if with_chat else None

    def run(self, journal: Journal, bar: Bar) -> None:
        """Run the rows that the journal does not hold, and append their samples."""
        known = [(str(record["id"]), str(record["prompt_ids_hash"])) for record in journal.records()]
        asked = asked_of(self.rows, self.config.seed, self.chat, self.config.fewshot_as_multiturn)
        bar.advance(len(known))
        first = 0
        for block in _blocks(asked):
            done = min(max(len(known) - first, 0), len(block))
            if done < len(block):
                requests = self._requests(block)
                _check_known(known[first : first + done], block, requests, journal.path)
                for start, samples in self._samples(block, requests, done):
                    new = samples[max(done - start, 0) :]
                    journal.append(new)
                    bar.advance(len(new))
            first += len(block)

    def _requests(self, block: Sequence[Asked]) -> list[list[TokenRequest]]:
        if self.rows.task.generates:
            return [[prompt] for prompt in self.encoder.prompts(block, self.config.max_new_tokens)]
        return self.encoder.choices(block)

    def _samples(
        self, block: Sequence[Asked], requests: Sequence[list[TokenRequest]], done: int
    ) -> Iterator[tuple[int, list[JsonObject]]]:
        task = self.rows.task
        if task.generates:
            prompts = [row[0] for row in requests]
            for start, answers in self.engine.answer(block, prompts, task.until, done):
                pairs = zip(block[start:], requests[start:], answers, strict=False)
                yield (
                    start,
                    [
                        {
                            **_asked(row, ids),
                            "answer": text,
                            "target": row.target,
                            "correct": grade_text(task, row, text),
                        }
                        for row, ids, text in pairs
                    ],
                )
            return
        for start, values in self.engine.score(block, requests, done):
            yield (
                start,
                [
                    {
                        **_asked(row, ids),
                        "choices": row.choices,
                        "logprobs": [round(value, 6) for value in logprobs],
                        "target": row.target,
                        "correct": grade_choices(task, row, logprobs),
                    }
                    for row, ids, logprobs in zip(block[start:], requests[start:], values, strict=False)
                ],
            )


def _asked(row: Asked, requests: Sequence[TokenRequest]) -> JsonObject:
    cut = max(request.cut for request in requests)
    return {
        "id": row.id,
        "group": row.group,
        "prompt": row.contexts[0] if len(row.contexts) == 1 else row.contexts,
        "prompt_ids_hash": hash_of(requests),
        **({"cut": cut} if cut else {}),
    }


def _blocks(asked: Iterator[Asked]) -> Iterator[list[Asked]]:
    """Rows of one group, at most BLOCK at once."""
    for _, rows in groupby(asked, key=lambda row: row.group):
        held: list[Asked] = []
        for row in rows:
            held.append(row)
            if len(held) == BLOCK:
                yield held
                held = []
        if held:
            yield held


def _check_known(
    known: Sequence[tuple[str, str]], block: Sequence[Asked], requests: Sequence[list[TokenRequest]], path: Path
) -> None:
    """Refuse samples of other rows or prompts. A resume compares model, data and settings before; this is the proof."""
    for (name, digest), row, ids in zip(known, block, requests, strict=False):
        if (name, digest) != (row.id, hash_of(ids)):
            raise InputError(f"{path} holds row {name} where row {row.id} belongs", "start over with --force")


def _write_samples(path: Path, samples: Sequence[JsonObject]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.writelines(to_line(sample) for sample in samples)
