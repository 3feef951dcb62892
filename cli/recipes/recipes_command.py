"""`gemma2 recipes`: the recipes that come with the package, by command, size of the model and machine."""
import typer
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, Force, Quiet, file_option, recipe_path
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)


@app.callback(context_settings=HELP_NAMES)
def recipes() -> None:
    """R."""


@app.command(name="list", cls=HelpCommand, context_settings=HELP_NAMES)
def list_recipes(as_json: bool = AsJson, quiet: bool = Quiet) -> None:
    """L"""
