"""`gemma2 push`"""

from __future__ import annotations

from pathlib import Path

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Quiet

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def push(
    uri: str = typer.Argument(
        metavar="URI",
        help="Folder to copy to: s3://bucket/runs, gs://..., file://..., or a path; each output becomes URI/NAME.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    outputs: list[Path] = typer.Argument(
        metavar="DIR", help="Complete outputs.", show_default=False, rich_help_panel="Inputs"
    ),
    force: bool = typer.Option(
        False, "--force", help="Replace another output of this name there.", rich_help_panel="Output and control"
    ),
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Copy outputs to another disk or an object store: what is there with the right digest is not sent again.

    Every file is read back and compared with the digest in the manifest, which is sent last. S3 needs s3fs, Google
    Cloud gcsfs, Azure adlfs; keys come from the environment, as these packages read it.

    \b
      gemma2 push s3://bucket/runs runs/align/sft runs/align/rl
      gemma2 push /mnt/archive warp --dry-run
    """
    from gemma2.core.home import at_home
    from gemma2.posttrain.transfer.pushing import plan_push, push_outputs

    console = Console(as_json=as_json, quiet=quiet)
    places = at_home(outputs)
    found = plan_push(uri, places) if dry_run else push_outputs(uri, places, force, console)
    console.result(found)
    if not as_json:
        console.text("")
        console.table(found["outputs"])
