"""`gemma2 inspect`"""

from __future__ import annotations

from pathlib import Path

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Quiet
from gemma2.core.json_files import JsonObject

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _overview(found: JsonObject) -> JsonObject:
    """The facts about a directory, a line each."""
    lineage = found["lineage"] or {}
    return {
        **(_of_adapter if found["kind"] == "adapter" else _of_model)(found),
        "parameters": found["parameters"],
        "tensors": len(found["tensors"]),
        "dtypes": found["dtypes"],
        "megabytes": found["bytes"] / 1e6,
        "made by": lineage.get("command"),
        "made from": [f"{parent.get('role')} {parent.get('path')}" for parent in lineage.get("parents") or ()] or None,
        "finished": lineage.get("ended"),
    }


def _of_model(found: JsonObject) -> JsonObject:
    return {
        "model": found["path"],
        "architecture": " ".join(found["architectures"] or ()),
        "tied embeddings": found["tied_embeddings"],
        "stored copies": found["tied_copies"] or None,
        "shards": len(found["shards"]),
    }


def _of_adapter(found: JsonObject) -> JsonObject:
    return {
        "adapter": found["path"],
        "of model": found["base_model"],
        "rank": found["rank"],
        "scale": found["scale"],
        "targets": found["targets"],
        "in full": found["replaced"] or None,
    }


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def inspect(
    directory: Path = typer.Argument(
        metavar="DIR", help="A model or adapter directory, or a hub id.", show_default=False, rich_help_panel="Inputs"
    ),
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor.", rich_help_panel="Settings"),
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show tensors, dtypes, parameters, tied weights, shards and lineage of a model, read from its headers alone.

    For a LoRA adapter: its rank, scale, targets and base model.

    \b
      gemma2 inspect merged --tensors
    """
    from gemma2.merging.inputs.weight_files import check_folders

    check_folders({"model": directory})
    console = Console(as_json=as_json, quiet=quiet)
    if dry_run:
        from gemma2.merging.inspect.inspection import plan_inspection

        console.result({"plan": f"inspect {directory}, nothing was read but file names", **plan_inspection(directory)})
        return
    from gemma2.merging import inspect_model

    found = inspect_model(directory)
    if as_json:
        console.json(found)
        return
    for line in found.get("warnings", ()):
        console.warn(line)
    console.result(_overview(found))
    console.text("")
    console.table(found["tensors"] if tensors else found["groups" if found["kind"] == "model" else "updates"])
