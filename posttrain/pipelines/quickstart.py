"""The whole path on the embedded models, from nothing to a front: the pipeline `configs/quickstart.yaml`. Torch-free.

    tiny student and teacher -> teacher data -> filter -> SFT -> distillation -> preference pairs -> reward model
    -> WARP -> front -> chosen model, report

Each stage is the command that the screen shows, so that any of them can be repeated by hand with other settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2.configs import recipes
from gemma2.core.json_files import JsonMapping, JsonObject, load_json, write_json
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.reports.headline import PolicyRow, rows_of
from gemma2.posttrain.reports.plots.gains import scale_of
from gemma2.posttrain.reports.plots.values import column

from .compile import Pipeline, compile_pipeline, read_pipeline
from .executors.processes import LocalExecutor
from .run import run_pipeline
from .scheduler import Observer

__all__ = ["quickstart_pipeline", "run_quickstart", "shown_rows"]

UNITS = {
    "reward": "score of the reward model", "kl": "nats per answer, to the policy from which RL started",
    "judge": "score of the judge, 0 to 1", "accuracy": "share", "style": "share", "length": "tokens",
}  # fmt: skip


def quickstart_pipeline(out: Path, file: Path | None = None, sets: Sequence[str] = ()) -> Pipeline:
    """The pipeline of configs/quickstart.yaml, or of another file.

    Raises UsageError for a setting that its stage does not take.
    """
    return compile_pipeline(read_pipeline(file or recipes()["quickstart"], sets), out)


def run_quickstart(
    pipeline: Pipeline, jobs: int, observer: Observer | None = None, progress: Progress = SILENT
) -> JsonObject:
    """Run every stage that is not done, measure, and write summary.json and the report.

    Returns the content of summary.json (units, rows, chosen, samples, points) and the path of the report.
    """
    out = pipeline.root
    result = run_pipeline(pipeline, LocalExecutor(jobs), observer=observer, progress=progress)
    report, kept = out / "report.html", out / "summary.json"
    if result.ran or not report.exists() or not kept.exists():
        write_json(kept, _summary(out))
        from gemma2.posttrain.reports.page import write_report

        write_report(out, report)
    summary = load_json(kept)
    return {**summary, "report": str(report)}


def _summary(out: Path) -> JsonObject:
    """Base, SFT, distilled, best single run, the merge of every iteration, the chosen model; answers before and after.

    All figures are numbers, with their standard errors and 95 % intervals as separate entries; `units` has their units.
    """
    from gemma2.posttrain.evaluation.front_files import read_entries, read_front
    from gemma2.posttrain.evaluation.likeliest import likeliest_answers

    front = read_front(out / "warp" / "front", "front")
    points = front["points"]
    entries = read_entries(out / "warp" / "front", front)
    model = load_json(out / "warp" / "model" / "gemma2.json")
    picked = model["summary"]
    measured = [point for point in points if point["kind"] != "trajectory"]
    rows = rows_of(measured, picked)
    paths = {point["name"]: entry.candidate.models[-1].path for point, entry in zip(measured, entries, strict=True)} | {
        row.point["name"]: out / "warp" / "model" for row in rows if "chosen" in row.role
    }
    questions = [sample["prompt"][-1]["content"] for sample in entries[0].samples]
    answers = {row.title: paths[row.point["name"]] for row in rows}
    return {
        "units": UNITS,
        "rows": [_row(row) for row in rows],
        "chosen": {key: picked[key] for key in picked if key in ("label", "single") or "_over_" in key},
        "samples": likeliest_answers(answers, _one_of_each(questions), front["settings"]["max_new_tokens"]),
        "points": points,
    }


def _row(row: PolicyRow) -> JsonObject:
    """A row of the table: label, role, and every figure with its error and its interval."""
    figures = {
        f"{name}{part}": row.point.get(f"{name}{part}")
        for name in UNITS
        for part in ("", "_se", "_low", "_high")
        if f"{name}{part}" in row.point
    }
    return {"label": row.label, "role": row.role, "name": row.point["name"], **figures}


def shown_rows(summary: JsonMapping) -> list[dict[str, str]]:
    """The table for the screen: each figure with its standard error, all of a column with the same decimals."""
    rows = summary["rows"]
    titles = {
        "reward": "reward",
        "kl": "KL, nats",
        "judge": "judge",
        "accuracy": "accuracy, %",
        "length": "length, tokens",
    }
    columns = {
        title: column(rows, name, scale_of(name)) for name, title in titles.items() if any(name in row for row in rows)
    }
    return [
        {
            "policy": f"{row['label']} ({row['role']})" if row["role"] else row["label"],
            **{title: " ± ".join(filter(None, cells[i].values())) for title, cells in columns.items()},
        }
        for i, row in enumerate(rows)
    ]


def _one_of_each(questions: Sequence[str], limit: int = 4) -> list[str]:
    """The first question of each kind (by its first word), so that the skills show."""
    kinds: dict[str, str] = {}
    for question in questions:
        kinds.setdefault(question.split()[0], question)
    return list(kinds.values())[:limit]
