"""`gemma2 config`: the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import typer

from gemma2.cli.terminal.completion import every_recipe
from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, Quiet, recipe_path
from gemma2.configs import recipes
from gemma2.core.errors import UsageError
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.posttrain.schemas.config import load_yaml, to_yaml

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)


@app.callback(context_settings=HELP_NAMES)
def config() -> None:
    """List and show recipes: YAML files with the settings of a command, for --config."""


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
    values = load_yaml(path)
    console = Console(as_json=as_json, quiet=quiet)
    if as_json:
        console.json(values)
        return
    console.text(to_yaml(values) if path.name == MANIFEST else path.read_text(encoding="utf-8"))


def _purpose(path: Path) -> str:
    """The first line of a recipe, a comment that states its purpose."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
