"""`gemma2 pareto`"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import stage
from gemma2.core.json_files import JsonMapping
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas import ParetoConfig


def run(config: ParetoConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.pareto import run_pareto

    result = run_pareto(config, options, progress)
    if isinstance(progress, Console) and not progress.as_json:
        show(progress, options.out, result.summary)
    return result


def show(console: Console, out: Path, summary: JsonMapping) -> None:
    """Print the front in characters, and the best point within each KL limit."""
    from gemma2.posttrain.reports.plots.textplot import front_text

    points = json.loads((out / "front.json").read_text(encoding="utf-8"))["points"]
    console.text("The KL-reward front\n" + front_text(points, width=console.width(76)) + "\n")
    rows = list(best_rows(summary["best_at"]))
    if rows:
        console.table(rows, "The best point within each KL limit (nats per sequence to SFT), mean ± standard error")
        console.text("")


def best_rows(best: Sequence[JsonMapping]) -> Iterator[dict[str, str]]:
    """Rows of the table of `best_at` of a front."""
    from gemma2.posttrain.reports.plots.values import number, with_error

    for point in best:
        figures = {name: with_error(point, name) for name in ("reward", "kl")}
        text = {name: f"{f['value']} ± {f['error']}" if f["error"] else f["value"] for name, f in figures.items()}
        yield {"KL at most": number(point["limit"]), "point": point["name"], "reward": text["reward"], "KL": text["kl"]}


app = stage(
    ParetoConfig,
    run,
    examples="""gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --policies rl-1,rl-2 --out front
    gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --merged slerp --etas 0,.3,1 --out front
    gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --fronts front-1,front-2 --out both""",
)
