"""What a measure keeps: a record per row while it runs, and its results at the end.

    results.json          version, model and its digest, settings, figures by task
    results.csv           one line per task and metric
    samples/TASK.jsonl    one line per row; of a second model (--against) in samples/against/TASK.jsonl

Rows are computed in parts that depend on the data and the settings only. Each part is in a journal before the next one
begins, so a killed run continues with the same rows in the same batches, and its files have the same bytes. Without
`--out` nothing is written. Torch-free.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, finite, write_json
from gemma2.core.outputs.model_identity import digest_model
from gemma2.core.progress import Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.evaluation.compared.card_rows import with_card_rows
from gemma2.posttrain.evaluation.compared.kept_results import read_result, samples_of, task_comparison
from gemma2.posttrain.generation.journal import Journal
from gemma2.posttrain.runs.inputs import model_name
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.runs.together import together
from gemma2.posttrain.schemas.config import Config

__all__ = ["AGAINST", "FORMAT", "NOWHERE", "Kept", "MeasureOutcome", "as_document", "keeping", "task_names"]

FORMAT = 1  # of results.json
NOWHERE = Path()  # the `out` of a run that writes nothing
AGAINST = "against"
RESULTS, TABLE, SAMPLES = "results.json", "results.csv", "samples"

Key = tuple[object, ...]


@dataclass
class MeasureOutcome:
    """What a measure found.

    tasks    name -> {"n", "metrics", "stderr", "low", "high", ...}
    samples  name -> rows
    """

    tasks: dict[str, JsonObject]
    samples: dict[str, list[JsonObject]] = field(default_factory=dict)


class Kept:
    """The records of a measure by key, those of an interrupted run included.

    Every process of a job has all of them; the journals are on rank 0.
    """

    def __init__(self, run: Run | None, stack: ExitStack, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.run = run
        self._stack = stack
        self._folder: Path | None = None  # of the journals
        self._journal = None if run is None else self.journal("rows.jsonl")
        self._known = ranks.on_main(lambda: {_key(record): record for record in self._recorded()})

    def _recorded(self) -> Iterator[JsonObject]:
        yield from self._journal.records() if self._journal is not None else ()

    @property
    def folder(self) -> Path | None:
        """Where the files of the output go; None where this process writes nothing."""
        return None if self.run is None or not self.ranks.is_main else self.run.path

    def journal(self, name: str) -> Journal:
        """A journal of this measure, closed at its end; where nothing is written it is in a temporary folder."""
        if not self.ranks.is_main:
            return Journal(None)
        if self._folder is None:
            if self.run is None:
                self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="gemma2-eval-")))
            else:
                self._folder = self.run.checkpoints
                self._folder.mkdir(exist_ok=True)
        return self._stack.enter_context(Journal(self._folder / name))

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def __getitem__(self, key: Key) -> JsonObject:
        return self._known[key]

    def add(self, records: Iterable[JsonObject]) -> None:
        """Keep the records of one part, each with its `key`."""
        found = list(records)
        if self._journal is not None:
            self._journal.append(found)
        self._known |= {_key(record): record for record in found}


def _key(record: JsonMapping) -> Key:
    return tuple(record["key"])


@contextmanager
def keeping(command: str, config: Config, options: RunOptions) -> Iterator[Kept]:
    """Open the output of a measure, or nothing where `options.out` is NOWHERE. End the block with `as_document`."""
    with ExitStack() as stack:
        ranks = stack.enter_context(together(config))
        run = None
        if options.out != NOWHERE:
            run = stack.enter_context(open_run(command, config, options, ranks=ranks))
        yield Kept(run, stack, ranks)


def as_document(
    kept: Kept, config: Config, outcomes: Sequence[MeasureOutcome], reading: Reading, progress: Progress
) -> RunResult:
    """Write the results, and return them for the screen. outcomes: of the model, and of the one it is compared with."""
    summary = kept.ranks.on_main(lambda: _written(kept, config, outcomes, reading, progress))
    return RunResult(NOWHERE, summary) if kept.run is None else kept.run.finish(summary)


def _written(
    kept: Kept, config: Config, outcomes: Sequence[MeasureOutcome], reading: Reading, progress: Progress
) -> JsonObject:
    """Write the results; the document where there is no output, else the summary for the manifest."""
    counts = reading.report(progress, kept.folder)
    models = {name: getattr(config, name, None) for name in ("model", "win_rate")}
    found: JsonObject = {
        "version": FORMAT,
        **{name: _described(path) for name, path in models.items() if isinstance(path, Path)},
        "settings": _settings(config),
        "tasks": outcomes[0].tasks,
        **_comparison(getattr(config, AGAINST, None), outcomes, progress),
        **counts,
    }
    document = _plain(found)
    if kept.run is None:
        return document
    folder = kept.run.path
    write_json(folder / RESULTS, with_card_rows(document))
    _write_table(folder / TABLE, [outcome.tasks for outcome in outcomes])
    for place, outcome in zip((folder / SAMPLES, folder / SAMPLES / AGAINST), outcomes, strict=False):
        for name, rows in outcome.samples.items():
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.jsonl").write_bytes(b"".join(to_line(_plain(row)) for row in rows))
    return _summary(outcomes[0].tasks)


def _summary(tasks: dict[str, JsonObject]) -> JsonObject:
    """The figures for the manifest and the last line of a stage: the first two of each task."""
    several = len(tasks) > 1
    return {
        f"{name} {metric}" if several else metric: value
        for name, found in tasks.items()
        for metric, value in list(found["metrics"].items())[:2]
    }


def _plain(document: JsonObject) -> JsonObject:
    """A document without NaN and infinity."""
    found = finite(document)
    assert isinstance(found, dict)
    return found


def _comparison(against: Path | None, outcomes: Sequence[MeasureOutcome], progress: Progress) -> JsonObject:
    """How the model differs from another one, or from a result of before, row by row (`compared/`)."""
    if against is None:
        return {}
    ours, other = outcomes[0], outcomes[1] if len(outcomes) > 1 else None
    before = read_result(against) if other is None else {}
    theirs = before["tasks"] if other is None else other.tasks
    found: JsonObject = {}
    for name, rows in ours.samples.items():
        if name not in theirs:
            progress.warn(f"--against {against} has no task {name}: it has {', '.join(theirs)}")
            continue
        try:
            samples = list(samples_of(against, name)) if other is None else other.samples[name]
            found[name] = task_comparison(name, ours.tasks[name], rows, samples)
        except InputError as error:  # of two tokenizers, for example: the figures stand as they are
            progress.warn(f"{error.what}; {error.hint}")
    described = before["model"] if other is None else _described(against)
    return {AGAINST: described, f"tasks_{AGAINST}": theirs, "compared": found}


def _described(path: Path) -> JsonObject:
    return {"name": model_name(path), "digest": digest_model(path)}


def _settings(config: Config) -> JsonObject:
    """The settings without paths, which differ from machine to machine: the manifest has those."""
    found = {}
    for name, value in config.recorded().items():
        if value in ([], {}, None) or _holds_a_path(getattr(config, name)):
            continue
        is_path = name in config.PATHS_AS_TEXT and Path(str(value)).is_dir()
        found[name] = model_name(Path(str(value))) if is_path else value
    return found


def _holds_a_path(value: object) -> bool:
    return isinstance(value, Path) or (isinstance(value, tuple) and any(isinstance(item, Path) for item in value))


def _write_table(path: Path, outcomes: Sequence[dict[str, JsonObject]]) -> None:
    """One line per model, task and metric."""
    rows = [
        {
            "of": of,
            "task": task,
            "metric": metric,
            "value": value,
            **{column: found.get(column, {}).get(metric, "") for column in ("stderr", "low", "high")},
            "n": found["n"],
        }
        for of, tasks in zip(("model", AGAINST), outcomes, strict=False)
        for task, found in tasks.items()
        for metric, value in found["metrics"].items()
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["of", "task", "metric", "value", "stderr", "low", "high", "n"])
        writer.writeheader()
        writer.writerows(rows)


def task_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its own, and a number behind names that occur before. No name leaves the folder."""
    found: list[str] = []
    for path in paths:
        plain = "".join(char if char.isalnum() or char in "._-" else "_" for char in path.name).lstrip(".") or "data"
        name, number = plain, 2
        while name in found:
            name, number = f"{plain}-{number}", number + 1
        found.append(name)
    return found
