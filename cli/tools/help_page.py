"""`gemma2 help`"""

from __future__ import annotations

import typer

from gemma2.cli.terminal.completion import commands
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def help(
    command: list[str] | None = typer.Argument(
        None,
        metavar="COMMAND",
        help="A command, or a command and its sub-command.",
        show_default=False,
        autocompletion=commands,
    ),
) -> None:
    """Show the page of a command, as its --help does; without a command, that of gemma2.

    \b
      gemma2 help sft
      gemma2 help merge slerp
    """
    from gemma2.cli.app import invoke

    invoke([*(word for word in command or () if word != "help"), "--help"])
