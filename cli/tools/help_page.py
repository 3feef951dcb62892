"""`gemma2 help`"""

from __future__ import annotations

import typer

from gemma2.cli.app import COMMANDS, invoke, load
from gemma2.cli.terminal.completion import begun
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def named(ctx: typer.Context, incomplete: str) -> list[str]:
    """The commands, and after one that has them its sub-commands."""
    words = [str(word) for word in ctx.params.get("command") or ()]
    if not words:
        return begun((name for name in COMMANDS if name != "help"), incomplete)
    inner = getattr(load(words[0]), "commands", {}) if words[0] in COMMANDS and len(words) == 1 else {}
    return begun(inner, incomplete)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def help(
    command: list[str] | None = typer.Argument(
        None,
        metavar="COMMAND",
        help="A command, or a command and its sub-command.",
        show_default=False,
        autocompletion=named,
    ),
) -> None:
    """Show the page of a command, as its --help does; without a command, that of gemma2.

    \b
      gemma2 help sft
      gemma2 help merge slerp
    """
    invoke([*(word for word in command or () if word != "help"), "--help"])
