"""The flags of a schema, one per field, with the field's name, bounds and description."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.fields import REPEATED

from .completion import items_of

__all__ = ["Flags", "TypeForm", "field_option", "flag_type", "flags_of", "one_word", "split_lists"]

LONGEST_DEFAULT = 40  # characters; the help does not show a longer default

# A type or a construct of typing such as Literal["a", "b"]; no static type covers both.
TypeForm: TypeAlias = Any
# Value of every flag by parameter name, as typer parsed it; its type is the annotation of the flag.
Flags: TypeAlias = JsonObject


def _repeated(field: FieldInfo) -> bool:
    """Whether the flag of a list is given once per item."""
    return field.json_schema_extra == REPEATED


def flag_type(field: FieldInfo) -> TypeForm:
    """The type that typer parses for a field: text for tuples, whose items are separated by commas."""
    annotation = field.annotation
    if _repeated(field):
        return list[str]
    if get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(item for item in get_args(annotation) if item is not type(None))
    if get_origin(annotation) is Literal:
        return annotation
    if get_origin(annotation) is tuple:
        return str
    return annotation


def _is_input(field: FieldInfo) -> bool:
    """Whether a field names a file or directory, or a list of them."""
    return Path in (field.annotation, *get_args(field.annotation))


def _limits(field: FieldInfo) -> Iterator[str]:
    """The bounds of a number as help text: `>0`, `<=1`."""
    for item in field.metadata:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if hasattr(item, name):
                yield f"{sign}{getattr(item, name):g}"


def _default(field: FieldInfo) -> Iterator[str]:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        yield "required"
    elif isinstance(value, tuple):
        yield from ["default " + ",".join(str(item) for item in value)] if value else []
    elif isinstance(value, str) and len(value) > LONGEST_DEFAULT:
        yield "has a default"
    elif value is not None and value is not False:
        yield f"default {value:g}" if isinstance(value, float) else f"default {value}"
    yield from _choices(field)


def _choices(field: FieldInfo) -> Iterator[str]:
    """The allowed items of a list as help text, if they are restricted; for a single value the metavar shows them."""
    if items := _items(field):
        yield "of " + ", ".join(items)


def _items(field: FieldInfo) -> tuple[str, ...]:
    """The allowed items of a list, if they are restricted."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is tuple else ()
    return next((get_args(item) for item in kinds if get_origin(item) is Literal), ())


def _metavar(kind: object, is_list: bool) -> str | None:
    if is_list:
        return "A,B,..."
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    names: dict[object, str] = {Path: "PATH", int: "INT", float: "FLOAT", str: "TEXT"}
    return names.get(kind)


def field_option(name: str, field: FieldInfo) -> Any:  # noqa: ANN401  # as typer.Option: the default of any type
    """The typer option of one field, with its default and bounds in the help."""
    kind = flag_type(field)
    flag = f"--{name.replace('_', '-')}"
    facts = "; ".join([*_default(field), *_limits(field)])
    return typer.Option(
        None,
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        metavar="TEXT" if _repeated(field) else _metavar(kind, get_origin(field.annotation) is tuple),
        help=(field.description or "") + (f" [{facts}]" if facts else ""),
        show_default=False,
        rich_help_panel="Inputs" if _is_input(field) else "Settings",
        autocompletion=items_of(choices) if (choices := _items(field)) else None,
    )


def flags_of(schema: type[Config]) -> dict[str, inspect.Parameter]:
    """One keyword parameter per field of a schema, except mappings, which only --set and recipes can give."""
    # Inputs first, then fields of this command alone, then fields that it inherits.
    own = schema.__annotations__
    ordered = sorted(schema.model_fields.items(), key=lambda item: (not _is_input(item[1]), item[0] not in own))
    parameters = {}
    for name, field in ordered:
        if get_origin(field.annotation) is dict:
            continue
        parameters[name] = inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field_option(name, field),
            annotation=flag_type(field) | None,
        )
    return parameters


def split_lists(schema: type[Config], flags: Flags) -> Flags:
    """The flags with the comma-separated text of tuple fields split into tuples, and repeated ones as tuples."""
    split: Flags = {}
    for name, value in flags.items():
        split[name] = value
        if isinstance(value, list):  # a repeated flag; if it is not given, typer's version decides: empty or None
            split[name] = tuple(value) or None
        elif isinstance(value, str) and get_origin(schema.model_fields[name].annotation) is tuple:
            if {int, float} & {*get_args(schema.model_fields[name].annotation)}:
                value = one_word(f"--{name.replace('_', '-')}", value)
            split[name] = tuple(part.strip() for part in value.split(",") if part.strip())
    return split


def one_word(flag: str, text: str) -> str:
    """The numbers of a flag, without the brackets of a list. Raises UsageError if blanks alone separate them."""
    inside = text.strip()
    inside = inside[1:-1] if inside[:1] + inside[-1:] in ("[]", "()") else inside
    parts = [part.split() for part in inside.split(",")]
    if any(len(words) > 1 for words in parts):
        items = ",".join(word for words in parts for word in words)
        raise UsageError(
            f"{flag} '{text}' has blanks between its items", f"separate them by commas: {flag} {items}", flag
        )
    return inside
