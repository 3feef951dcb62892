"""`gemma2 quickstart`"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, ConfigFile, Quiet, Set, recipe_path
from gemma2.core.errors import UsageError

from .pipeline import Announcer, kept_for_later

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

NEXT = """\
What to try next
  gemma2 merge slerp {out}/warp/iteration-1/policy-1 {out}/warp/iteration-1/policy-2 --out merged
  gemma2 eval --model merged --sft {out}/distilled --reward {out}/reward --prompts {out}/models/heldout.jsonl
  gemma2 quickstart --seed 1 --set warp.policies=4 --out {out}-4
  gemma2 sft --model {out}/models/student --data {out}/clean --max-length 96 --show-tokens 3
With a real Gemma 2 (a directory, or its hub id) the commands are the same:
  gemma2 generate --teacher google/gemma-2-9b-it --prompts prompts.jsonl --out data
  gemma2 filter data --out clean
  gemma2 sft --model google/gemma-2-2b --data clean --out sft"""


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def quickstart(
    out: Path = typer.Option(
        None,
        "--out",
        "-o",
        metavar="DIR",
        help="Directory of the whole run; goes on where it was.",
        rich_help_panel="Inputs",
    ),
    seed: int = typer.Option(
        None, "--seed", metavar="INT", help="Seed of every random choice [default 0].", rich_help_panel="Settings"
    ),
    jobs: int = typer.Option(
        None,
        "--jobs",
        "-j",
        metavar="INT",
        min=1,
        help="Stages at once [default 2, 1 on one core].",
        rich_help_panel="Settings",
    ),
    config: str = ConfigFile,
    set_: list[str] = Set,
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print the commands of every step, run nothing.", rich_help_panel="Output and control"
    ),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """The whole path on the embedded models: teacher data, SFT, reward model, WARP, the KL-reward front, a report.

    Takes about five minutes on two cores, needs no model and no network. Interrupted and started again, it goes on
    where it was.

    \b
      gemma2 quickstart --out quickstart
    """
    if out is None:
        raise UsageError("--out is missing", "give the directory to write")
    console = Console(as_json=as_json, quiet=quiet)
    from gemma2.posttrain.pipelines.quickstart import quickstart_pipeline, run_quickstart
    from gemma2.posttrain.runs.commands import spell

    sets = [*(set_ or ()), *([f"vars.seed={seed}"] if seed is not None else [])]
    pipeline = quickstart_pipeline(out, recipe_path(config or "quickstart"), sets)
    if dry_run:
        stages = pipeline.stages.values()
        commands = [spell(stage.command, stage.config(), stage.out) for stage in stages]
        if as_json:
            console.json({"commands": commands})
        else:
            console.text("\n".join(commands))
        return
    started = time.monotonic()
    announcer = Announcer(console, len(pipeline.stages))
    with kept_for_later(console, out):
        result = run_quickstart(pipeline, jobs or min(2, os.cpu_count() or 1), announcer, console)
    if as_json:
        console.json({key: result[key] for key in ("rows", "samples", "report")})
        return
    show(console, result, out, time.monotonic() - started)


def show(console: Console, result: dict[str, Any], out: Path, seconds: float) -> None:
    """The table, the front, answers before and after, and where everything is."""
    from gemma2.posttrain.reports.plots.figures import front_text

    console.text("")
    console.table(result["rows"], f"Held-out prompts, mean ± standard error ({seconds:.0f} s)")
    console.text("\nThe KL-reward front\n" + front_text(result["points"], width=76))
    console.text("\nAnswers to held-out questions, sampled at the temperature of the RL stage")
    for sample in result["samples"]:
        console.text(f"  {sample['prompt']}")
        for title, answer in sample.items():
            if title != "prompt":
                console.text(f"      {title:<15} {answer}")
    report = Path(result["report"])
    console.text(
        f"\nReport  {report}\nFront   {out}/warp/front/front.png, front.svg, front.csv\nModel   {out}/warp/model\n"
    )
    console.text(NEXT.format(out=os.fspath(out)))
