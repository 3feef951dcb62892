"""The whole path on the embedded models, from nothing to a front: the pipeline `configs/quickstart.yaml`. Torch-free.

    tiny student and teacher -> teacher data -> filter -> SFT -> distillation -> preference pairs -> reward model
    -> WARP -> front -> chosen model, report

Each stage is the command that the screen shows, so that any of them can be repeated by hand with other settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma2.configs import recipes
from gemma2.core.json_files import JsonObject, write_json
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.reports.plots.values import title_of

from .compile import Pipeline, compile_pipeline, read_pipeline
from .executors.processes import LocalExecutor
from .run import run_pipeline
from .scheduler import Observer

__all__ = ["quickstart_pipeline", "run_quickstart"]


def quickstart_pipeline(out: Path, file: Path | None = None, sets: Sequence[str] = ()) -> Pipeline:
    """The pipeline of configs/quickstart.yaml, or of another file.

    Raises UsageError for a setting that its stage does not take.
    """
    return compile_pipeline(read_pipeline(file or recipes()["quickstart"], sets), out)


def run_quickstart(
    pipeline: Pipeline, jobs: int, observer: Observer | None = None, progress: Progress = SILENT
) -> JsonObject:
    """Run every stage that is not done, measure, and write summary.json and the report.

    Returns {"rows": table rows, "samples": answers before and after, "points": the front, "report": path}.
    """
    out = pipeline.root
    result = run_pipeline(pipeline, LocalExecutor(jobs), observer=observer, progress=progress)
    summary = _summary(out)
    report = out / "report.html"
    if result.ran or not report.exists():
        write_json(out / "summary.json", summary)
        from gemma2.posttrain.reports.page import write_report

        write_report(out, report)
    return {**summary, "report": str(report)}


def _summary(out: Path) -> JsonObject:
    """The table base, SFT, distilled, best single RL, WARP 1..I, and answers before and after."""
    front = out / "warp" / "front"
    points = json.loads((front / "front.json").read_text(encoding="utf-8"))["points"]
    chosen = list(_chosen(points))
    samples = [json.loads(line) for line in (front / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "rows": [_row(title, point) for title, point in chosen],
        "samples": _side_by_side(samples, {point["name"]: title for title, point in chosen}),
        "points": points,
    }


def _chosen(points: list[JsonObject]) -> Iterator[tuple[str, JsonObject]]:
    """The policies before RL, the single RL run of iteration 1 with the highest reward, each iteration's slerp."""
    for kind in ("base", "sft"):
        yield from ((title_of(point), point) for point in points if point["kind"] == kind)
    first = [point for point in points if point["kind"] == "policy" and point["iteration"] == 1]
    yield "best single RL", max(first, key=lambda point: point["reward"])
    yield from ((f"WARP {point['iteration']}", point) for point in points if point["kind"] == "slerp")


def _row(title: str, point: JsonObject) -> JsonObject:
    """A line of the table: each figure with its standard error."""

    def figure(name: str, digits: int, scale: float = 1.0) -> str:
        return f"{point[name] * scale:.{digits}f} ± {point[name + '_se'] * scale:.{digits}f}"

    return {
        "policy": title,
        "reward": figure("reward", 2),
        "KL, nats": figure("kl", 2),
        "judge": figure("judge", 3),
        "accuracy, %": figure("accuracy", 1, 100),
        "length, tokens": f"{point['length']:.1f}",
    }


def _side_by_side(samples: list[JsonObject], titles: dict[str, str], limit: int = 4) -> list[dict[str, str]]:
    """Answers of the chosen policies in the order of the table: [{"prompt": ..., <title>: completion, ...}].

    One prompt of each kind (by its first word), so that the skills show.
    """
    answers = {
        (sample["prompt"][-1]["content"], titles.get(sample["name"])): sample["completion"] for sample in samples
    }
    kinds: dict[str, str] = {}
    for prompt, _ in answers:
        kinds.setdefault(prompt.split()[0], prompt)
    return [
        {"prompt": prompt, **{title: answers[prompt, title] for title in titles.values() if (prompt, title) in answers}}
        for prompt in list(kinds.values())[:limit]
    ]
