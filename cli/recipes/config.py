"""`gemma2 config`: checks of settings files, their JSON Schemas, and recipes from files of other tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from gemma2.cli.terminal.completion import begun, every_recipe
from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet, file_option
from gemma2.core.errors import InputError, OutputError
from gemma2.core.outputs.promised import promise
from gemma2.posttrain.foreign.settings.account import KeyRow, shown
from gemma2.posttrain.recipe_files.named_recipe import recipe_path

if TYPE_CHECKING:
    from gemma2.posttrain.foreign.settings.imports import Imported

setting = partial(typer.Option, show_default=False, rich_help_panel="Settings")
OutFile = file_option(None, "--out", "-o", help="Recipe to write.")
SchemaFile = file_option(None, "--out", "-o", help="File to write; default: stdout.")


def settings_of(incomplete: str) -> list[str]:
    """The commands that take settings, and the kinds of files."""
    from gemma2.posttrain.recipe_files.schema_index import FILE_KINDS, commands_with_settings

    return begun([*commands_with_settings(), *FILE_KINDS], incomplete)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)


@app.callback(context_settings=HELP_NAMES)
def config() -> None:
    """Check settings files, print their JSON Schema, import those of other tools. Recipes: gemma2 recipes."""


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def check(
    file: Path = typer.Argument(
        metavar="FILE",
        help="Recipe, pipeline, or file of merges (ours or mergekit's); also the name of a recipe, or an output.",
        show_default=False,
        rich_help_panel="Inputs",
        autocompletion=every_recipe,
    ),
    command: str = setting(
        "",
        "--as",
        metavar="COMMAND",
        help="Command that the file is for; default: by its first line or its keys.",
        autocompletion=settings_of,
    ),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Check every key and value of a YAML file, and name all faults at once: line, column, what to write instead.

    No model and no data set is opened, which --dry-run of the command does. Exits with 1 if there is a fault.

    \b
      gemma2 config check recipe.yaml
      gemma2 config check align
      gemma2 config check mine.yaml --as "reward pairs"
    """  # fmt: skip
    from gemma2.posttrain.recipe_files.settings_check import check_file

    path = recipe_path(str(file), flag="")
    assert path is not None  # a name was given
    report = check_file(path, command)
    console = Console(as_json=as_json, quiet=quiet)
    if as_json:
        console.json({"file": str(path)} | report.as_json())
    else:
        for fault in report.faults:
            console.text(f"{fault.where or path}: {fault.what}; {fault.fix}")
        read_as = f"read as {_kind(report.kind)}, by {report.known_by}"
        counted = {0: "no faults", 1: "1 fault"}.get(len(report.faults), f"{len(report.faults)} faults")
        console.text(f"{path}: {counted} ({read_as})")
    if report.faults:
        raise typer.Exit(1)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def schema(
    command: list[str] = typer.Argument(
        metavar="COMMAND",
        help="A command (sft, reward pairs), pipeline, or merge.",
        show_default=False,
        rich_help_panel="Settings",
        autocompletion=settings_of,
    ),
    out: Path | None = SchemaFile,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Print the JSON Schema of a command's recipe, of pipelines or of files of merges: editors complete keys with it.

    Keys have their meaning with the unit, their bounds and their default. An editor with a YAML language server reads
    it where the first lines of a file hold `# yaml-language-server: $schema=FILE`.

    \b
      gemma2 config schema sft --out sft.schema.json
      gemma2 config schema reward pairs
      gemma2 config schema pipeline
    """  # fmt: skip
    from gemma2.core.outputs.text_file import write_text
    from gemma2.posttrain.recipe_files.json_schema import json_schema

    found = json_schema(" ".join(command))
    console = Console(as_json=as_json, quiet=quiet)
    if out is None:
        console.json(found)
        return
    if out.exists() and not force:
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    if dry_run:
        console.result({"would write": str(out)})
        return
    write_text(promise(out, file=True), json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    console.result({}, out)


def _kind(kind: str) -> str:
    return {"pipeline": "a pipeline", "merge": "a file of merges"}.get(kind, f"a recipe of gemma2 {kind}")


@app.command(name="import", cls=HelpCommand, context_settings=HELP_NAMES)
def import_settings(
    file: Path = typer.Argument(
        metavar="FILE",
        help="YAML or JSON file of TRL, axolotl or LLaMA-Factory.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    form: Literal["trl", "axolotl", "llamafactory"] | None = setting(
        None, "--format", metavar="trl|axolotl|llamafactory", help="Tool of the file; default: by its keys."
    ),
    kind: Literal["sft", "reward", "dpo", "rlhf"] | None = setting(
        None, "--as", metavar="sft|reward|dpo|rlhf", help="What the file trains; default: by its keys."
    ),
    strict: bool = setting(
        False, "--strict", help="Write nothing, with exit code 1, if a key that decides results has no counterpart."
    ),
    out: Path | None = OutFile,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Read settings of TRL, axolotl or LLaMA-Factory: a recipe, and what became of every key.

    The recipe goes to --out, else to stdout with the account on stderr. Values that the file leaves to the defaults of
    its tool stand in the recipe where ours differ. Pairs for DPO become a reward model, as there is no DPO here.

    \b
      gemma2 config import qlora.yml --out recipe.yaml
      gemma2 config import sft.yaml --format trl --as reward --strict
    """  # fmt: skip
    from gemma2.core.outputs.text_file import write_text
    from gemma2.posttrain.foreign.settings.imports import import_file

    if out is not None and out.exists() and not force:
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    found = import_file(file, form, kind)
    console = Console(as_json=as_json, quiet=quiet)
    lines = [*map(_line, found.rows), *_end(found, str(out) if out else "recipe.yaml")]
    failed = strict and bool(found.deciding)
    if as_json and not failed:
        console.json(found.document() | {"out": str(out) if out else None})
    for line in [] if as_json else lines:
        console.text(line) if out is not None else console.note(line)
    if failed:
        keys = ", ".join(row.key for row in found.deciding)
        raise InputError(f"{file}: no counterpart for {keys}", "take them out of the file, or drop --strict")
    if dry_run:
        console.note(f"nothing was written{f' to {out}' if out else ''}")
    elif out is not None:
        write_text(promise(out, file=True), found.recipe())
    elif not as_json:
        console.text(found.recipe())


LABELS = {
    "taken": "taken",
    "default": "same as the default",
    "unneeded": "not needed",
    "missing": "NO COUNTERPART",
    "implied": "not in the file",
}


def _line(row: KeyRow) -> str:
    """One key of the foreign file on one line."""
    what = "" if row.value is None else f" {shown(row.value)}"
    rest = " ".join(filter(None, [row.here, f"({row.why})" if row.here and row.why else row.why]))
    return f"{LABELS[row.verdict]}: {row.key}{what}{' -> ' if rest else ''}{rest}"


def _end(found: Imported, recipe: str) -> Iterator[str]:
    """The count of the keys without a counterpart, and how to go on."""
    decide = f", results depend on {len(found.deciding)} of them" if found.lacking else ""
    yield f"{len(found.lacking)} without a counterpart{decide}"
    yield from (f"next: {command}" for command in found.following(recipe))
