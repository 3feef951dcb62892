"""`gemma2 report`"""

from __future__ import annotations

from pathlib import Path

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet, file_option
from gemma2.core.errors import OutputError
from gemma2.core.outputs.promised import promise

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


Page = file_option(Path("report.html"), "--out", "-o", help="HTML file to write [default report.html].")


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def report(
    directory: Path = typer.Argument(
        metavar="DIR",
        help="Output of a pipeline (warp, quickstart) or of one command, finished or not.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    out: Path = Page,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Write one self-contained HTML page about a run: the front of every iteration, what the merges kept, the curves,
    the lineage, answers before and after, every setting.

    If the run failed or is not finished, the page says what is missing and why.

    \b
      gemma2 report quickstart --out report.html
    """
    from gemma2.posttrain.reports.page import plan_report, write_report

    if out.exists() and not force:
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    if dry_run:
        plan = {"plan": f"report {directory} -> {out}, nothing was written", **plan_report(directory)}
        Console(as_json=as_json, quiet=quiet).result(plan)
        return
    Console(as_json=as_json, quiet=quiet).result({}, write_report(directory, promise(out, file=True)))
