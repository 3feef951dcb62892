"""`gemma2 pull`"""

from __future__ import annotations

from pathlib import Path

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet
from gemma2.core.outputs.promised import promise
from gemma2.core.outputs.staging import out_is

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def pull(
    uri: str = typer.Argument(
        metavar="URI",
        help="An output: s3://bucket/runs/sft, gs://..., file://..., or a path.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    out: Path = typer.Argument(
        metavar="DIR",
        help="Directory to write; it appears when all is there and verified.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Fetch an output that `gemma2 push` has copied: every file is compared with the digest in the manifest.

    Broken off, the same command goes on where it was. S3 needs s3fs, Google Cloud gcsfs, Azure adlfs.

    \b
      gemma2 pull s3://bucket/runs/sft sft
      gemma2 pull s3://bucket/runs/sft sft --dry-run
    """
    from gemma2.core.home import at_home
    from gemma2.posttrain.transfer.pulling import plan_pull, pull_output

    console = Console(as_json=as_json, quiet=quiet)
    out = at_home(out)
    with out_is("DIR"):
        if dry_run:
            console.result(plan_pull(uri, out, force))
            return
        promise(out)
        console.result(pull_output(uri, out, force, console), out)
