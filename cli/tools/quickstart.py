"""`gemma2 quickstart`"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.gain_lines import show_gains
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import (
    HELP_NAMES,
    AllowVersions,
    AsJson,
    ConfigFile,
    DryRun,
    Out,
    Quiet,
    Set,
    required_out,
)
from gemma2.cli.terminal.plan_view import end_plan
from gemma2.core.errors import OutputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.promised import promise
from gemma2.core.permissions import allow
from gemma2.posttrain.recipe_files.named_recipe import recipe_path

from .pipeline import Announcer, kept_for_later
from .pipeline_options import jobs_option

if TYPE_CHECKING:
    from gemma2.posttrain.pipelines.compile import Pipeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Jobs = jobs_option(help="Stages that run at once [default 2, 1 on one core].")

NEXT = """\
What to try next
  gemma2 merge slerp {out}/warp/iteration-1/policy-1 {out}/warp/iteration-1/policy-2 --out merged
  gemma2 eval --model merged --sft {out}/distilled --reward {out}/reward --max-new-tokens 28 \\
    --prompts {out}/models/heldout.jsonl
  gemma2 quickstart --seed 1 --set warp.iterations=3 --out {out}-3
  gemma2 sft --model {out}/models/student --data {out}/clean --max-length 96 --show-tokens 3
With a real Gemma 2 (a directory, or its hub id) the commands are the same:
  gemma2 generate --teacher google/gemma-2-9b-it --prompts prompts.jsonl --out data
  gemma2 filter data --out clean
  gemma2 sft --model google/gemma-2-2b --data clean --out sft"""


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def quickstart(
    seed: int | None = typer.Option(
        None, "--seed", metavar="INT", help="Seed of every random choice [default 0].", rich_help_panel="Settings"
    ),
    jobs: int | None = Jobs,
    out: Path | None = Out,
    config: str | None = ConfigFile,
    set_: list[str] | None = Set,
    allow_versions: bool = AllowVersions,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Run every stage on the embedded models: teacher data, SFT, reward model, WARP, the KL-reward front, a report.

    Takes two to five minutes on two cores; needs no other model and no network. Started again after an interruption, it
    continues where it stopped. The plan of --dry-run is the command of every stage.

    \b
      gemma2 quickstart --out quickstart
    """
    out = required_out(out)
    allow(versions=allow_versions)
    console = Console(as_json=as_json, quiet=quiet)
    from gemma2.posttrain.pipelines.quickstart import quickstart_pipeline, run_quickstart
    from gemma2.posttrain.runs.commands import spell

    sets = [*(set_ or ()), *([f"vars.seed={seed}"] if seed is not None else [])]
    pipeline = quickstart_pipeline(out, recipe_path(config or "quickstart"), sets)
    if dry_run:
        from gemma2.posttrain.pipelines.check import check_pipeline

        plan = check_pipeline(pipeline)
        stages = pipeline.stages.values()
        commands = [spell(stage.command, stage.config(), stage.out) for stage in stages]
        if as_json:
            console.json({"commands": commands})
        else:
            console.text("\n".join(commands))
        for line in plan.warnings:
            console.warn(line)
        end_plan(plan.problems, console)
        return
    _refuse_another(pipeline)
    promise(out)
    started = time.monotonic()
    announcer = Announcer(console, len(pipeline.stages))
    with kept_for_later(console, out):
        result = run_quickstart(pipeline, jobs or min(2, os.cpu_count() or 1), announcer, console)
    if as_json:
        console.json({key: result[key] for key in ("units", "rows", "chosen", "samples", "report")})
        return
    show(console, result, out, time.monotonic() - started)


def _refuse_another(pipeline: Pipeline) -> None:
    """Refuse to replace the outputs of a quickstart of other settings, which would be gone stage by stage."""
    from gemma2.posttrain.pipelines.run import FILE, recorded_file
    from gemma2.posttrain.schemas.config import load_yaml

    if not (pipeline.root / FILE).is_file():
        return
    before, now = load_yaml(pipeline.root / FILE), recorded_file(pipeline)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if not changed:
        return
    ours, theirs = now.get("vars", {}), before.get("vars", {})
    values = [f"{key} {theirs.get(key)} -> {value}" for key, value in ours.items() if theirs.get(key) != value]
    raise OutputError(
        f"--out {pipeline.root} holds a quickstart of other settings ({', '.join(values or changed)})",
        f"choose another --out, such as {pipeline.root}-2",
    )


def show(console: Console, result: JsonObject, out: Path, seconds: float) -> None:
    """Print the table, the front, answers before and after, and the paths of the outputs."""
    from gemma2.posttrain.pipelines.quickstart import shown_rows
    from gemma2.posttrain.reports.plots.figures import front_text

    console.text("")
    console.table(shown_rows(result), f"Held-out prompts, mean ± standard error ({seconds:.0f} s)")
    show_gains(console, result["chosen"], result["points"])
    console.text("\nThe KL-reward front\n" + front_text(result["points"], width=console.width(76)))
    console.text("\nThe likeliest answers to held-out questions; the figures above are of drawn ones")
    width = max((len(title) for sample in result["samples"] for title in sample), default=0)
    for sample in result["samples"]:
        console.text(f"  {sample['prompt']}")
        for title, answer in sample.items():
            if title != "prompt":
                console.text(f"      {title:<{width}} {answer}")
    report = Path(result["report"])
    console.text(
        f"\nReport  {report}\nFront   {out}/warp/front/front.png, front.svg, front.csv\nModel   {out}/warp/model\n"
    )
    console.text(NEXT.format(out=os.fspath(out)))
