"""Configuration: YAML recipe < `--set a.b=c` < named flags, validated by a pydantic schema.

Torch-free. An unknown key is an error that names its path and the closest valid key; `1e-6` reads as a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.yaml_files import apply_sets, closest, parse_value, read_documents, to_yaml

__all__ = ["Config", "apply_sets", "closest", "is_given", "load_yaml", "parse_value", "resolve", "to_yaml", "validated"]


class Config(BaseModel):
    """Base of every command's schema: frozen, no unknown keys, schema built on first use (start-up time)."""

    # No NaN or infinity: JSON cannot hold them, and no field has a use for them.
    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, protected_namespaces=(), allow_inf_nan=False
    )
    INCIDENTAL: ClassVar[frozenset[str]] = frozenset()  # fields that affect speed or price, not the result
    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset()  # fields that the command's words give, not flags

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: object, info: ValidationInfo) -> object:
        """Refuse an empty text for a path, which would be the working directory, and for an option that is off."""
        if value == "" and isinstance(value, str) and info.field_name is not None:
            field = cls.model_fields[info.field_name]
            kinds = (field.annotation, *get_args(field.annotation))
            if Path in kinds or (type(None) in kinds and field.default is None):
                raise ValueError("is empty, which is not a value here (leave it out)")
        return value

    def recorded(self) -> JsonObject:
        """The configuration as the manifest of an output records it."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=Config)


def is_given(value: object) -> bool:
    """Whether a flag or field says anything: not None, not an unset switch, not an empty list or mapping.

    0 and 0.0 do, although they equal False.
    """
    return not (value is None or value is False or (isinstance(value, list | tuple | dict) and not value))


def load_yaml(path: Path) -> JsonObject:
    """Read a recipe, or the configuration that the manifest of an output records.

    Raises UsageError with file and line if the file is not a YAML mapping.
    """
    documents = read_documents(path)
    if len(documents) > 1:
        raise UsageError(f"{path} holds {len(documents)} YAML documents", "give one recipe per file")
    document = documents[0] if documents else {}
    config = document.get("config")
    return config if path.name == MANIFEST and isinstance(config, dict) else document


def resolve(
    schema: type[C],
    *,
    file: Path | None = None,
    sets: Iterable[str] = (),
    flags: JsonMapping | None = None,
    section: str = "",
) -> C:
    """Merge recipe, `--set` and flags (None = not given), validate, and return the frozen configuration.

    section  place of the values in a larger recipe, for the error messages

    Raises UsageError that names the key, the value, its bounds and the file.
    """
    values = apply_sets(load_yaml(file) if file else {}, sets)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    return validated(schema, values, file=file, section=section)


def validated(schema: type[C], values: JsonMapping, *, file: Path | None = None, section: str = "") -> C:
    """Return the frozen configuration of these values. Raises UsageError like `resolve`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UsageError(*_explain(schema, error, file, section)) from error


def _explain(schema: type[Config], error: ValidationError, file: Path | None, section: str) -> tuple[str, str]:
    """Return (what, hint) for the first problem of a pydantic report, with the number of the others."""
    # A mistyped key also causes a "missing" error: the typo is the cause, so it is named first.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    key = ".".join([*filter(None, [section]), *map(str, first["loc"])]) or "configuration"
    where = f" in {file}" if file else ""
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{where}{more}", closest(
            str(first["loc"][-1]), _fields_at(schema, first["loc"][:-1])
        )
    if first["type"] == "missing":
        flag = "" if section else f"give --{key.replace('_', '-')} or "  # a section of a larger recipe has no flags
        return f"'{key}' is missing{where}{more}", f"{flag}set it in the recipe"
    if first["loc"] and first["loc"][-1] == "[key]":  # YAML reads 1, on and no as a number and booleans
        place = key.removesuffix(".[key]")
        return f"the name '{place}'{where} is read as {first['input']!r}{more}", "put it in quotes"
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    if not first["loc"] and not section:  # options that contradict each other: the message is "what; hint"
        what, _, hint = message.partition("; ")
        return f"{what}{where}{more}", hint or "see --help for the allowed values"
    given = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    field = schema.model_fields.get(str(first["loc"][0])) if first["loc"] else None
    if first["type"] == "string_pattern_mismatch" and field is not None:  # the description is clearer than the pattern
        return f"'{key}'{given}{where} does not fit{more}", str(field.description)
    return f"'{key}'{given}{where}: {message[:1].lower()}{message[1:]}{more}", "see --help for the allowed values"


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys at a place inside a schema."""
    current = schema
    for part in location:
        field = current.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        current = inner
    return list(current.model_fields)
