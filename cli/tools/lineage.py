"""`gemma2 lineage`"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Form, Quiet, file_option
from gemma2.core.errors import OutputError, UsageError
from gemma2.core.outputs.promised import promise

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

OutFile = file_option(None, "--out", "-o", help="Write the drawing to this file instead of stdout.")

PIPE_WIDTH = 120  # columns outside a terminal, where the width is unknown


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def lineage(
    directory: Path = typer.Argument(
        metavar="DIR",
        help="Output of a gemma2 command, or of a pipeline.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    form: Literal["text", "mermaid", "svg"] = Form,
    out: Path | None = OutFile,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show what an output was made from: all models and files of rows, from the roots to the result, with hashes.

    Parents that are missing, or whose weights have changed since, are marked. A folder of a pipeline stands for its
    last stage.

    \b
      gemma2 lineage merged
      gemma2 lineage quickstart --format svg --out family.svg
    """  # fmt: skip
    from gemma2.core.outputs.text_file import write_text
    from gemma2.posttrain.reports.lineage import read_lineage
    from gemma2.posttrain.reports.lineage_tree import rendered

    if as_json and (out is not None or form != "text"):
        raise UsageError("--json has its own format and goes to stdout", "drop --format and --out, or drop --json")
    if out is not None and out.exists() and not force:
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    found = read_lineage(directory)
    console = Console(as_json=as_json, quiet=quiet)
    if dry_run:
        where = out or "stdout"
        console.result({"plan": f"lineage {directory} -> {where}, nothing was written", "nodes": len(found.origins)})
        return
    if as_json:
        console.json(found.document())
    elif out is not None:
        console.result({}, write_text(promise(out, file=True), rendered(found, form)))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
        console.text(rendered(found, form, width))
