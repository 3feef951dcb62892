"""Help pages: sections of two columns, in the terminal's width, bold only on a terminal.

Typer's own pages come through rich's Markdown and tables, which alone take 0.15 s; these take a few milliseconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["HelpCommand", "HelpGroup"]

LONGEST_NAME = 34  # characters; a longer name takes a line of its own
Row = tuple[str, str]


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)


def _bold(text: str) -> str:
    on = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"\033[1m{text}\033[0m" if on else text


def _section(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """One titled block of names and texts."""
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


def _parameter_row(parameter: Any) -> Row:
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper(), parameter.help or ""
    names = ", ".join(sorted(parameter.opts, key=len)) + "".join(f"/{name}" for name in parameter.secondary_opts)
    value = f" {parameter.metavar}" if parameter.metavar and not parameter.is_flag else ""
    return names + value, parameter.help or ""


def _sections(parameters: Iterable[Any]) -> dict[str, list[Row]]:
    """Rows by panel, in order of first appearance."""
    found: dict[str, list[Row]] = {}
    for parameter in parameters:
        if not getattr(parameter, "hidden", False):
            found.setdefault(parameter.rich_help_panel or "Other", []).append(_parameter_row(parameter))
    return found


def _head(ctx: Any, text: str | None) -> Iterator[str]:
    """Usage, then the docstring as it was written, paragraphs re-wrapped."""
    yield f"{_bold('Usage:')} {ctx.command_path} {' '.join(ctx.command.collect_usage_pieces(ctx))}"
    for paragraph in (text or "").strip().split("\n\n"):
        yield ""
        kept, mark, example = paragraph.partition("\b\n")  # what follows the mark stands as it was written
        yield example if mark else textwrap.fill(" ".join(kept.split()), _width())


class HelpCommand(TyperCommand):
    """A command whose page shows its options by panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        lines = list(_head(ctx, self.help))
        for title, rows in _sections(self.get_params(ctx)).items():
            lines += _section(title, rows)
        formatter.write("\n".join(lines) + "\n")


class HelpGroup(TyperGroup):
    """A group whose page shows its commands by panel, then its options. Called with nothing, it shows the page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args or self.invoke_without_command else ["--help"])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        lines = list(_head(ctx, self.help))
        panels: dict[str, list[Row]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            summary = command.get_short_help_str(200)
            panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, summary))
        for title, rows in [*panels.items(), *_sections(self.get_params(ctx)).items()]:
            lines += _section(title, rows)
        formatter.write("\n".join(lines) + "\n")
