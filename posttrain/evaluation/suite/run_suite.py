"""`gemma2 eval --suite`: every row asked, graded and kept, so that an interrupted run continues at its next row.

A row's result is written to a journal in `checkpoints/` as soon as its batch is done; samples and results are made of
the journals at the end. A run that was killed at any point and continued gives the same bytes.

Several processes are dealt the batches; journals, samples and results are rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject, read_json
from gemma2.core.outputs.manifest import metadata_version
from gemma2.core.progress import SILENT, Progress
from gemma2.core.progress import Task as Bar
from gemma2.core.ranks import Ranks
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.evaluation.compared.card_rows import with_card_rows
from gemma2.posttrain.evaluation.compared.figure import write_figures
from gemma2.posttrain.evaluation.compared.kept_results import is_result, read_result, samples_of, task_comparison
from gemma2.posttrain.evaluation.compared.published import shape_of
from gemma2.posttrain.generation.journal import Journal
from gemma2.posttrain.models.loading import quiet_libraries
from gemma2.posttrain.runs.inputs import model_name
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.runs.together import together
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
AGAINST = "against"


def run_suite(config: SuiteConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Measure `config.model`, and `config.against` if it is a model; results and samples in `options.out`.

    Raises InputError for rows that do not fit their task and for a broken model, UsageError for a missing engine.
    """
    with together(config) as ranks:
        return _shared(config, options, progress if ranks.is_main else SILENT, ranks)


def _shared(config: SuiteConfig, options: RunOptions, progress: Progress, ranks: Ranks) -> RunResult:
    check_engine(config)
    check_model(config)
    tables = tables_of(config)
    other = config.against
    earlier = read_result(other) if other is not None and is_result(other) else None
    if other is not None and earlier is None:
        check_model(config.model_copy(update={"model": other}))
    quiet_libraries()
    with open_run("eval suite", config, options, ranks=ranks) as run:
        document, samples = _measured(run, config, "model", tables, progress)
        if other is not None and earlier is None:
            second, theirs = _measured(run, config, AGAINST, tables, progress)
            document |= {"against": second["model"], "tasks_against": second["tasks"]}
        elif other is not None and earlier is not None:
            theirs = {name: [*samples_of(other, name)] for name in document["tasks"] if name in earlier["tasks"]}
            document |= {"against": earlier["model"]}
        if not ranks.is_main:
            return run.finish({})  # rank 0 has the samples
        if other is not None:
            document["compared"] = _compared(document, samples, theirs)
        write_results(run.path, with_card_rows(document))
        write_figures(run.path, document, config.published)
        return run.finish(_summary(document))


Samples = dict[str, list[JsonObject]]


def _measured(
    run: Run, config: SuiteConfig, role: str, tables: Sequence[TaskRows], progress: Progress
) -> tuple[JsonObject, Samples]:
    """Run the tasks with one of the two models: its figures, and its samples, which are in the output then.

    On ranks but 0 the samples and figures of no task.
    """
    path = config.model if role == "model" else config.against
    assert path is not None
    own = config.model_copy(update={"model": path})
    inside = "" if role == "model" else role
    journals = run.checkpoints / inside
    if run.ranks.is_main:
        journals.mkdir(parents=True, exist_ok=True)
    with_chat = uses_chat(path, config.chat)
    run.phase = f"loading of {'the model' if role == 'model' else '--against'}"
    engine, encoder, facts = open_engine(own, run.ranks)
    document: JsonObject = {
        "version": VERSION,
        "gemma2": metadata_version(),
        "model": _model(run, role, path, facts),
        "suite": config.suite,
        "settings": _settings(config, with_chat),
        "tasks": {},
    }
    kept: Samples = {}
    for rows in tables:
        name = rows.task.task
        run.phase = name
        work = _TaskRun(own, rows, engine, encoder, with_chat)
        with Journal(journals / f"{name}.jsonl" if run.ranks.is_main else None) as journal:
            with progress.task(f"{rows.task.title} {inside}".rstrip(), len(rows.evaluated), "rows") as bar:
                work.run(journal, bar, run.ranks)
            if not run.ranks.is_main:
                continue
            kept[name] = [*journal.records()]
        _write_samples(run.path / SAMPLES / inside / f"{name}.jsonl", kept[name])
        document["tasks"][name] = found = task_result(rows, kept[name])
        for note in found["notes"]:
            progress.note(f"{rows.task.title}: {note}")
    return document, kept


def _compared(document: JsonObject, ours: Samples, theirs: Samples) -> JsonObject:
    return {name: task_comparison(name, document["tasks"][name], ours[name], rows) for name, rows in theirs.items()}


def _model(run: Run, role: str, path: Path, facts: JsonObject) -> JsonObject:
    weights = next(parent["weights"] for parent in run.origin["parents"] if parent["role"] == role)
    config = path / "config.json"
    return {
        "name": model_name(path),
        "weights": weights,
        **(shape_of(read_json(config)) if config.is_file() else {}),
        **facts,
    }


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

    def run(self, journal: Journal, bar: Bar, ranks: Ranks) -> None:
        """Run the rows that the journal does not hold, and append their samples."""
        known = ranks.on_main(
            lambda: [(str(record["id"]), str(record["prompt_ids_hash"])) for record in journal.records()]
        )
        asked = asked_of(self.rows, self.config.seed, self.chat, self.config.fewshot_as_multiturn)
        bar.advance(len(known))
        first = 0
        for block in _blocks(asked):
            done = min(max(len(known) - first, 0), len(block))
            if done < len(block):
                requests = self._requests(block)
                _check_known(known[first : first + done], block, requests, journal.path or Path(self.rows.task.task))
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
