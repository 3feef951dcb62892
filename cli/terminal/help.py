"""Help pages: sections of two columns, as wide as the terminal, bold only on a terminal.

Typer renders its pages with rich's Markdown and tables, which take 0.15 s; these pages take a few milliseconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from gemma2.core.home import at_home, text_at_home

from . import opening
from .mistakes import check_words

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter, Parameter

__all__ = ["HelpCommand", "HelpGroup"]

LONGEST_NAME = 34  # characters; a longer name gets a separate line
Row = tuple[str, str]


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)


def _bold(text: str) -> str:
    on = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"\033[1m{text}\033[0m" if on else text


def _section(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """Lines of one titled block: names on the left, wrapped texts on the right."""
    column = min(max(len(name) for name, _ in rows), LONGEST_NAME) + 4
    yield ""
    yield _bold(title)
    for name, text in rows:
        lines = textwrap.wrap(text, max(_width() - column, 20)) or [""]
        if len(name) > LONGEST_NAME:
            yield f"  {name}"
            name = ""
        yield f"  {name}".ljust(column) + lines[0]
        yield from (" " * column + line for line in lines[1:])


def _at_home(parameters: Sequence[Parameter], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a command line with `~` replaced in paths, also in those that are read as text."""
    inputs = {part.name for part in parameters if getattr(part, "rich_help_panel", "") == "Inputs"} | {"config", "name"}
    return {
        name: text_at_home(value) if isinstance(value, str) and name in inputs else at_home(value)
        for name, value in values.items()
    }


def _parameter_row(parameter: TyperArgument | TyperOption) -> Row:
    if isinstance(parameter, TyperArgument):
        return parameter.metavar or str(parameter.name).upper(), parameter.help or ""
    names = ", ".join(sorted(parameter.opts, key=len)) + "".join(f"/{name}" for name in parameter.secondary_opts)
    value = f" {parameter.metavar}" if parameter.metavar and not parameter.is_flag else ""
    return names + value, parameter.help or ""


def _sections(parameters: Iterable[Parameter]) -> dict[str, list[Row]]:
    """Rows by panel, in order of first appearance."""
    found: dict[str, list[Row]] = {}
    for parameter in parameters:
        if isinstance(parameter, TyperArgument | TyperOption) and not parameter.hidden:
            found.setdefault(parameter.rich_help_panel or "Other", []).append(_parameter_row(parameter))
    return found


def _head(ctx: Context, text: str | None) -> Iterator[str]:
    """Lines of the usage, then of the docstring with its paragraphs re-wrapped."""
    opening.clear()
    yield f"{_bold('Usage:')} {ctx.command_path} {' '.join(ctx.command.collect_usage_pieces(ctx))}"
    for paragraph in (text or "").strip().split("\n\n"):
        yield ""
        prose, mark, example = paragraph.partition("\b\n")  # text after the mark keeps its line breaks
        yield example if mark else textwrap.fill(" ".join(prose.split()), _width())


class HelpCommand(TyperCommand):
    """A command whose page shows its options by panel."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        check_words(self, args)
        rest = super().parse_args(ctx, args)
        ctx.params = _at_home(self.params, ctx.params)
        return rest

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        lines = list(_head(ctx, self.help))
        for title, rows in _sections(self.get_params(ctx)).items():
            lines += _section(title, rows)
        formatter.write("\n".join(lines) + "\n")


class HelpGroup(TyperGroup):
    """A group whose page shows its commands by panel, then its options. Called without arguments, it shows the page."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        check_words(self, args)
        rest = super().parse_args(ctx, args if args or self.invoke_without_command else ["--help"])
        ctx.params = _at_home(self.params, ctx.params)
        return rest

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        lines = list(_head(ctx, self.help))
        panels: dict[str, list[Row]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert command is not None
            summary = command.get_short_help_str(200)
            panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, summary))
        for title, rows in [*panels.items(), *_sections(self.get_params(ctx)).items()]:
            lines += _section(title, rows)
        formatter.write("\n".join(lines) + "\n")
