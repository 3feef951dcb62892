"""`gemma2 report`"""

from __future__ import annotations

from pathlib import Path

import typer

from gemma2.merging.errors import OutputError

from .console import Console
from .help import HelpCommand
from .options import HELP_NAMES, AsJson, Quiet

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def report(
    directory: Path = typer.Argument(metavar="DIR", help="Finished output of gemma2 warp or gemma2 quickstart."),
    out: Path = typer.Option(
        Path("report.html"),
        "--out",
        "-o",
        metavar="FILE",
        help="HTML file [default report.html].",
        show_default=False,
        rich_help_panel="Output and control",
    ),
    force: bool = typer.Option(
        False, "--force", help="Replace an existing file.", rich_help_panel="Output and control"
    ),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """One self-contained HTML page: the front, the angles, the curves, answers before and after, every setting.

    \b
      gemma2 report quickstart --out report.html
    """
    from gemma2.posttrain.evaluation.reporting.page import write_report

    if out.exists() and not force:
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    Console(as_json=as_json, quiet=quiet).result({}, write_report(directory, out))
