"""`gemma2 merge replace-tokenizer`"""

from __future__ import annotations

from pathlib import Path

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import AsJson, DryRun, Force, Out, Quiet, required_out
from gemma2.core.outputs.promised import promise

__all__ = ["replace_tokenizer"]

SOMEWHERE = Path("replaced")  # of a plan without --out
Model = typer.Argument(
    metavar="MODEL", help="A model directory or a hub id.", show_default=False, rich_help_panel="Inputs"
)
Donor = typer.Option(
    None,
    "--tokenizer",
    metavar="DIR",
    help="Directory or hub id with the new tokenizer.json and its chat template.",
    show_default=False,
    rich_help_panel="Inputs",
)


def replace_tokenizer(
    model: Path = Model,
    tokenizer: Path | None = Donor,
    out: Path | None = Out,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Give a model another tokenizer: rows of embedding and head for the new tokens, from those of the old ones.

    A token that the old tokenizer has keeps its row; another one gets the mean of the old tokens that its text is cut
    into, or of all tokens if it has no text. Train the model afterwards: means are a start, not an answer.

    \b
      gemma2 merge replace-tokenizer model --tokenizer other --out replaced
    """
    from gemma2.core.errors import UsageError
    from gemma2.merging.inputs.weight_files import check_folders

    out = out if dry_run else required_out(out)
    if tokenizer is None:
        raise UsageError("--tokenizer is missing", "give the directory with the new tokenizer")
    check_folders({"model": model})
    from gemma2.merging.replacement.replacement import plan_replacement
    from gemma2.merging.replacement.replacement import replace_tokenizer as replace

    console = Console(as_json=as_json, quiet=quiet)
    if dry_run:
        plan = plan_replacement(model, tokenizer, out or SOMEWHERE, force or out is None)
        console.result({"plan": f"replace-tokenizer {model} by {tokenizer}, nothing was written", **plan.summary()})
        return
    done = replace(model, tokenizer, out=promise(required_out(out)), force=force, progress=console)
    shown = done.summary() if as_json else {k: v for k, v in done.summary().items() if k not in ("notes", "tables")}
    console.result(shown, done.out)
