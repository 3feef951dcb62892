"""Configuration: YAML recipe < `--set a.b=c` < named flags, validated by a pydantic schema.

Torch-free. An unknown key is an error that names its path and the closest valid key; `1e-6` reads as a number.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gemma2.merging.errors import InputError, UsageError
from gemma2.merging.outputs import MANIFEST

__all__ = ["Config", "closest", "load_yaml", "parse_value", "resolve", "to_yaml"]


class Config(BaseModel):
    """Base of every command's schema: frozen, no unknown keys, schema built on first use (start-up time)."""

    # No NaN or infinity: neither passes through JSON, and no field means anything by them.
    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, protected_namespaces=(), allow_inf_nan=False
    )


C = TypeVar("C", bound=Config)
LISTED = 40  # names that still read as one line


def closest(name: str, valid: Iterable[str]) -> str:
    """`"did you mean 'x'?"`; when nothing is near, what is valid, or the nearest five of a long list."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    if len(names) > LISTED:
        return f"the nearest of {len(names)}: {', '.join(difflib.get_close_matches(name, names, n=5, cutoff=0.0))}"
    return f"valid: {', '.join(names)}"


# YAML 1.1 wants a dot in the mantissa and reads 1e-6 as text.
NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def _with_numbers(resolver: Any) -> Any:
    """Teach a YAML loader or dumper that `1e-6` is a number: the one reads it so, the other quotes such a text."""
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
    return resolver


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, except that a key given twice is an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    line = node.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice below line {line}")
            return super().construct_mapping(node, deep)

    return _with_numbers(Loader)


def parse_value(text: str) -> Any:
    """The YAML value of one `--set` right-hand side: `3`, `1e-6`, `true`, `[1, 2]`, `null`, else text."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError:
        return text


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe; the manifest of an output stands for the configuration that it records.

    Raises UsageError with file and line when it is not a YAML mapping.
    """
    import yaml

    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error})", "check --config") from error
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"{path} is not valid YAML: {detail}", "correct the file") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{path} holds a {type(document).__name__}, not key: value pairs", "see configs/ for recipes")
    if path.name == MANIFEST and isinstance(document.get("config"), dict):
        return document["config"]
    return document


def to_yaml(values: Mapping[str, Any]) -> str:
    """A dumped or recorded configuration as a recipe that reruns the same job."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """The safe dumper, as the counterpart of our loader."""

    return yaml.dump(dict(values), Dumper=_with_numbers(Dumper), sort_keys=False, allow_unicode=True)


def apply_sets(values: dict[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments to a nested mapping; returns a new one."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for item in sets:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {item!r} is not KEY=VALUE", "write for instance --set learning_rate=1e-6")
        *parents, last = path.replace("-", "_").split(".")
        node: Any = result
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise UsageError(f"--set {item!r}: '{key}' is a single value", "set it as a whole")
        node[last] = parse_value(text)
    return result


def resolve(
    schema: type[C],
    *,
    file: Path | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    section: str = "",
) -> C:
    """Merge recipe, `--set` and flags (None = not given), validate, and return the frozen configuration.

    `section` is where the values stand in a larger recipe, for the errors.

    Raises UsageError that names the key, the value, what is allowed and where it came from.
    """
    values = apply_sets(load_yaml(file) if file else {}, sets)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UsageError(*_explain(schema, error, file, section)) from error


def _explain(schema: type[Config], error: ValidationError, file: Path | None, section: str) -> tuple[str, str]:
    """One line for the first problem of a pydantic report, with the number of further ones."""
    # A mistyped key is also a missing one: the typo is the cause, so it is named first.
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
        return f"'{key}' is missing{where}{more}", f"give --{key.replace('_', '-')} or set it in the recipe"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    return f"'{key}'{given}{where}: {message[:1].lower()}{message[1:]}{more}", "see --help for the allowed values"


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys at a place inside a schema."""
    current = schema
    for part in location:
        field = current.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        current = inner
    return list(current.model_fields)
