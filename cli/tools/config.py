"""`gemma2 config`: the recipes that come with the package, and those that files of other tools become."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from gemma2.cli.terminal.completion import every_recipe
from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet, file_option, recipe_path
from gemma2.configs import recipes
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.outputs.promised import promise
from gemma2.posttrain.foreign.settings.account import KeyRow, shown
from gemma2.posttrain.schemas.config import load_yaml, to_yaml

if TYPE_CHECKING:
    from gemma2.posttrain.foreign.settings.imports import Imported

setting = partial(typer.Option, show_default=False, rich_help_panel="Settings")
OutFile = file_option(None, "--out", "-o", help="Recipe to write.")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)


@app.callback(context_settings=HELP_NAMES)
def config() -> None:
    """List, show and import recipes: YAML files with the settings of a command, for --config."""


@app.command(name="list", cls=HelpCommand, context_settings=HELP_NAMES)
def list_recipes(as_json: bool = AsJson, quiet: bool = Quiet) -> None:
    """List the recipes by name, with the command that each is for."""
    console = Console(as_json=as_json, quiet=quiet)
    console.result({name: _purpose(path) for name, path in recipes().items()})


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def show(
    name: str = typer.Argument(
        metavar="NAME", help="Name of a recipe, a YAML file, or an output.", autocompletion=every_recipe
    ),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Print a recipe, or the settings of an output, as a start for your own recipe."""
    path = recipe_path(name)
    if path is None:
        raise UsageError("no recipe is named", "see gemma2 config list")
    if path.name == MANIFEST and path.with_name("merge.yaml").is_file():
        path = path.with_name("merge.yaml")
    values = load_yaml(path)
    console = Console(as_json=as_json, quiet=quiet)
    if as_json:
        console.json(values)
        return
    console.text(to_yaml(values) if path.name == MANIFEST else path.read_text(encoding="utf-8"))


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


def _purpose(path: Path) -> str:
    """The first line of a recipe, a comment that states its purpose."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
