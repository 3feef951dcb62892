"""Configuration: YAML recipe < `--set a.b=c` < named flags, validated by a pydantic schema.

Torch-free. An unknown key is an error that names its path and the closest valid key; `1e-6` reads as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from gemma2.core.errors import UsageError
from gemma2.core.home import at_home, text_at_home
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.secret_text import secret_in
from gemma2.core.yaml_files import apply_sets, closest, parse_value, read_documents, to_yaml

from .messages import ValueSource, explained

__all__ = [
    "Config",
    "Need",
    "ValueSource",
    "apply_sets",
    "closest",
    "is_given",
    "load_yaml",
    "parse_value",
    "resolve",
    "to_yaml",
    "validated",
]


@dataclass(frozen=True)
class Need:
    """What some settings of a schema need. Given without it they are refused, not ignored in silence.

    fields   settings without an effect where `holds` is false
    without  why they have none: "without --engine openai"
    holds    whether a configuration has what they need
    fix      what gives them an effect, in front of "or drop ..."; empty where dropping is the only fix
    """

    fields: tuple[str, ...]
    without: str
    holds: Callable[[Any], object]
    fix: str = "give that"


def check_needs(config: BaseModel, needs: Iterable[Need]) -> None:
    """Raise ValueError, as "what; hint", for the first setting that was given and has no effect.

    A setting counts as given where it differs from its default: the configuration that an output records names all.
    """
    fields = type(config).model_fields
    for need in needs:
        for name in need.fields:
            default = fields[name].get_default(call_default_factory=True)
            if getattr(config, name) != default and not need.holds(config):
                flag = f"--{name.replace('_', '-')}"
                fix = f"{need.fix}, or drop {flag}" if need.fix else f"drop {flag}"
                raise ValueError(f"{flag} has no effect {need.without}; {fix}")


class Config(BaseModel):
    """Base of every command's schema: frozen, no unknown keys, schema built on first use (start-up time)."""

    # No NaN or infinity: JSON cannot hold them, and no field has a use for them.
    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, protected_namespaces=(), allow_inf_nan=False
    )
    INCIDENTAL: ClassVar[frozenset[str]] = frozenset()  # fields that affect speed or price, not the result
    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset()  # fields that the command's words give, not flags
    PATHS_AS_TEXT: ClassVar[frozenset[str]] = frozenset()  # fields of text that may be paths
    NEEDS: ClassVar[tuple[Need, ...]] = ()  # of the fields that a class adds; those of its bases hold too

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: object, info: ValidationInfo) -> object:
        """Refuse an empty text for a path, which would be the working directory, and for an option that is off."""
        if value == "" and isinstance(value, str) and info.field_name is not None:
            field = cls.model_fields[info.field_name]
            kinds = (field.annotation, *get_args(field.annotation))
            if Path in kinds or (type(None) in kinds and field.default is None):
                raise ValueError("is empty, which is not a value here; leave it out")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _home_is_expanded(cls, value: object, info: ValidationInfo) -> object:
        """Replace `~` in every path."""
        name = info.field_name or ""
        field = cls.model_fields[name]
        if Path in (field.annotation, *get_args(field.annotation)) or name in cls.PATHS_AS_TEXT:
            return _at_home(value)
        return value

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        check_needs(self, self._needs())
        return self

    @classmethod
    def _needs(cls) -> Iterator[Need]:
        return (need for kind in cls.__mro__ for need in vars(kind).get("NEEDS", ()))

    def without_effect(self) -> set[str]:
        """The fields that have no effect next to the others, and would be refused if they were given."""
        return {name for need in self._needs() if not need.holds(self) for name in need.fields}

    def recorded(self) -> JsonObject:
        """The configuration as the manifest of an output records it."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=Config)


def _at_home(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_at_home(item) for item in value]
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    return text_at_home(value) if isinstance(value, str) else at_home(value)


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
) -> C:
    """Merge recipe, `--set` and flags (None = not given), validate, and return the frozen configuration.

    Raises UsageError that names the key, the value, what is wrong, and the flag, `--set` or line that gave it.
    """
    sets = tuple(sets)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    values = apply_sets(load_yaml(file) if file else {}, sets) | given
    return validated(schema, values, ValueSource(file, sets, frozenset(given)))


def validated(schema: type[C], values: JsonMapping, source: ValueSource | None = None) -> C:
    """Return the frozen configuration of these values. Raises UsageError like `resolve`, and for a secret in them."""
    if found := secret_in(values):
        raise UsageError(
            f"'{found[0]}' is not accepted: {found[1]}, and outputs record settings",
            "keep it in the environment, and name the variable with --api-key-env or --judge-key-env",
        )
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise explained(schema, error.errors(), source or ValueSource()) from error
