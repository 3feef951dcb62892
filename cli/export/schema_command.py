"""A command of one schema whose first argument is a model, with the common flags that it names itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import typer

from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES
from gemma2.cli.terminal.schema_flags import Flags, TypeForm, flags_of, split_lists
from gemma2.posttrain.schemas.config import Config, resolve

__all__ = ["Flags", "TypeForm", "schema_command"]

C = TypeVar("C", bound=Config)
MODEL = "model"
KEYWORD = inspect.Parameter.KEYWORD_ONLY


def schema_command(
    schema: type[C],
    run: Callable[[C, Flags], None],
    common: Mapping[str, tuple[TypeForm, object]],
    examples: str,
    context: Mapping[str, object] | None = None,
) -> typer.Typer:
    """Return the command: `schema.model` is its argument, the other fields are flags, `common` further ones.

    run      gets the configuration, and the values of the common flags by name
    common   name -> type and option of typer
    context  settings of the parser
    """
    flags = {name: one for name, one in flags_of(schema).items() if name != MODEL}
    description = schema.model_fields[MODEL].description or ""
    argument = typer.Argument(
        metavar=MODEL.upper(),
        help=f"{description[:1].upper()}{description[1:]}.",
        show_default=False,
        rich_help_panel="Inputs",
    )

    def command(**values: object) -> None:
        given: Flags = values
        settings = split_lists(schema, {name: given[name] for name in (MODEL, *flags)})
        run(resolve(schema, flags=settings), {name: given[name] for name in common})

    parameters = [
        inspect.Parameter(MODEL, KEYWORD, default=argument, annotation=Path),
        *flags.values(),
        *(inspect.Parameter(name, KEYWORD, default=option, annotation=kind) for name, (kind, option) in common.items()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    command.__doc__ = f"{inspect.getdoc(schema)}\n\n\b\n{lines}"
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(cls=HelpCommand, context_settings={**HELP_NAMES, **(context or {})})(command)
    return app
