"""`gemma2 diff`"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet, file_option

if TYPE_CHECKING:
    from gemma2.core.json_files import JsonObject
    from gemma2.merging.inspect.difference import Difference, ModelDifference

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Plot = file_option(None, "--plot", help="Write a heat map of kinds of tensors by layers to a .svg or .png file.")

MOST_ROWS = 80  # a longer table is only in --json
# Field -> title of its column on the screen, what matters most first: a narrow terminal shows it next to the group.
FIRST = {"group": "group", "relative": "relative"}
WEIGHTS = {"angle": "angle", "cosine": "cosine"}
TASK_VECTORS = {"task_angle": "task angle", "task_cosine": "task cosine"}
NORMS = {"norm_difference": "|b-a|", "largest": "largest", "norm_a": "|a|", "norm_b": "|b|"}
TASK_NORMS = {"task_norm_a": "task |a|", "task_norm_b": "task |b|"}
LAST = {"parameters": "parameters"}


def _row(group: Difference) -> dict[str, object]:
    """One row of the table."""
    values = asdict(group)
    tasks = group.norm_base is not None
    columns = FIRST | (TASK_VECTORS if tasks else WEIGHTS) | NORMS | (TASK_NORMS if tasks else {}) | LAST
    return {title: values[name] for name, title in columns.items()}


def _figures_of_runs(found: ModelDifference, console: Console) -> JsonObject:
    """Note the angle and the noise scale of two RL runs from one base, and return them; nothing for other models."""
    if found.base is None:
        return {}
    from gemma2.posttrain.checks.merging_gain import angle_of_runs

    runs = angle_of_runs(found.a, found.b, found.base, replace(found, granularity="layer").groups)
    if runs is None:
        return {}
    console.note(runs.statement())
    return {"runs": runs.as_dict()}


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def diff(
    a: Path = typer.Argument(
        metavar="A",
        help="A model directory, a hub id, or a LoRA adapter.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    b: Path = typer.Argument(metavar="B", help="The other model.", show_default=False, rich_help_panel="Inputs"),
    base: Path | None = typer.Option(
        None,
        "--base",
        metavar="DIR",
        help="Init of both models; adds the norms of their task vectors and the angle between them.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    granularity: Literal["layer", "tensor"] = typer.Option(
        "layer",
        "--granularity",
        metavar="layer|tensor",
        help="The group of tensors in each row [default layer].",
        show_default=False,
        rich_help_panel="Settings",
    ),
    threads: int = typer.Option(
        2,
        "--threads",
        min=1,
        metavar="INT",
        help="Threads for reading and computing [default 2; >=1].",
        show_default=False,
        rich_help_panel="Settings",
    ),
    plot: Path | None = Plot,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show how two models differ, per layer or tensor: norms, relative and largest difference, cosine and angle.

    With --base the angle is that between the task vectors, the angle that SLERP uses. Sums are taken in fp64; memory
    use does not grow with the size of the models.

    \b
      gemma2 diff rl-1 rl-2 --base sft --plot angles.svg
      gemma2 diff sft merged --granularity tensor --json
    """
    from gemma2.merging.inputs.weight_files import check_folders

    check_folders({"model a": a, "model b": b} | ({"base": base} if base else {}))
    from gemma2.merging.inspect.difference import diff_models, plan_diff

    console = Console(as_json=as_json, quiet=quiet)
    if plot is not None:
        from gemma2.posttrain.reports.plots.heatmap import check_plot

        check_plot(plot, force)
    if dry_run:
        console.result({"plan": f"diff {a} {b}, no tensor was read", **plan_diff(a, b, base)})
        return
    found = diff_models(a, b, base=base, granularity=granularity, threads=threads, progress=console)
    for line in found.notes:
        console.note(line)
    for line in found.warnings:
        console.warn(line)
    runs = _figures_of_runs(found, console)
    if plot is not None:
        from gemma2.posttrain.reports.plots.heatmap import write_heat_map

        write_heat_map(found, plot, force)
    if as_json:
        console.json(found.as_dict() | runs | ({"plot": str(plot)} if plot else {}))
        return
    groups = found.groups if len(found.groups) <= MOST_ROWS else ()
    console.table([_row(group) for group in (*groups, found.total)])
    if plot is not None:
        console.result({"plot": str(plot)})
