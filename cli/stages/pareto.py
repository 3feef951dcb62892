"""`gemma2 pareto`"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.gain_lines import show_gains
from gemma2.cli.terminal.options import stage
from gemma2.core.json_files import JsonMapping, load_json
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import ParetoConfig


def run(config: ParetoConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.pareto import run_pareto

    result = run_pareto(config, options, progress)
    if isinstance(progress, Console) and not progress.as_json:
        show(progress, options.out, result.summary)
    return result


def show(console: Console, out: Path, summary: JsonMapping) -> None:
    """Print the front in characters, and the best point within each KL limit; nothing if no policy differs."""
    if not summary["differs"]:  # a warning has said so
        return
    from gemma2.posttrain.reports.plots.gains import CHOICE_NOTE, bounds_of
    from gemma2.posttrain.reports.plots.textplot import front_text
    from gemma2.posttrain.reports.plots.values import start_of

    front = load_json(out / "front.json")
    points = front["points"]
    console.text("The KL-reward front\n" + front_text(points, width=console.width(76)) + "\n")
    console.table(list(point_rows(points)), "Measured points, mean and 95 % interval")
    show_gains(console, summary["best"], points)
    rows = list(best_rows(summary["best_at"]))
    if rows:
        console.table(rows, f"The best point within each KL limit (nats per sequence to {start_of(points)})")
        console.text(fill(CHOICE_NOTE, console.width(76)) + "\n")
    if bounds_of(front, points):
        console.text(fill(f"The hypervolume is bounded by {bounds_of(front, points)}.", console.width(76)) + "\n")


def point_rows(points: Sequence[JsonMapping]) -> Iterator[dict[str, str]]:
    """Rows of the table of all points but the curves of RL runs."""
    from gemma2.posttrain.reports.plots.gains import called
    from gemma2.posttrain.reports.plots.values import spreads

    shown = [point for point in points if point["kind"] != "trajectory"]
    for point, reward, kl in zip(shown, spreads(shown, "reward"), spreads(shown, "kl"), strict=True):
        on_front = "yes" if point.get("on_front") else ""
        yield {"point": called(point), "reward": reward, "KL, nats": kl, "on the front": on_front}


def best_rows(best: Sequence[JsonMapping]) -> Iterator[dict[str, str]]:
    """Rows of the table of `best_at` of a front."""
    from gemma2.posttrain.reports.plots.gains import called
    from gemma2.posttrain.reports.plots.values import column_decimals, fixed, number, spreads

    decimals = column_decimals(best, "reward")
    for point, reward, kl in zip(best, spreads(best, "reward"), spreads(best, "kl"), strict=True):
        row = {"KL at most": number(point["limit"]), "point": called(point), "reward": reward, "KL, nats": kl}
        elsewhere = point.get("reward_elsewhere")
        row["of points"] = str(point["chosen_from"])
        yield row | {"on other prompts": "–" if elsewhere is None else fixed(elsewhere, decimals)}


app = stage(
    ParetoConfig,
    run,
    examples="""gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --policies rl-1,rl-2 --out front
    gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --merged slerp --etas 0,.3,1 --out front
    gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --fronts front-1,front-2 --out both""",
)
