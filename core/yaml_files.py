"""YAML files that users write: the safe loader, for which a key given twice is an error and `1e-6` is a number.

Deviation from YAML 1.1, which requires a dot in the mantissa and reads `1e-6` as text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import InputError, UsageError
from .json_files import JsonMapping, JsonObject

if TYPE_CHECKING:
    import yaml
    from yaml.resolver import BaseResolver

__all__ = ["apply_sets", "closest", "parse_value", "read_documents", "to_yaml"]

Resolver = TypeVar("Resolver", bound="type[BaseResolver]")

DEEPEST = 100  # levels of nesting; our own files have six
LISTED = 40  # names that still fit on one line
NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def closest(name: str, valid: Iterable[str]) -> str:
    """Return `"did you mean 'x'?"`; without a close match the valid names, or the nearest five of a long list."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    if len(names) > LISTED:
        return f"the nearest of {len(names)}: {', '.join(difflib.get_close_matches(name, names, n=5, cutoff=0.0))}"
    return f"valid: {', '.join(names)}"


def _with_numbers(resolver: Resolver) -> Resolver:
    """Teach a YAML loader or dumper that `1e-6` is a number: the loader reads a float, the dumper quotes such text."""
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
    return resolver


def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, except that a key given twice is an error."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    line = node.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice below line {line}")
            return super().construct_mapping(node, deep)

    return _with_numbers(Loader)


def parse_value(text: str) -> object:
    """Return the YAML value of the right-hand side of a `--set`: `3`, `1e-6`, `true`, `[1, 2]`, `null`, else text."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError:
        return text


def read_documents(path: Path) -> list[JsonObject]:
    """Return the mappings of a YAML file, one for each document that is not empty.

    Raises InputError if the file cannot be read, UsageError with file and line if it does not hold YAML mappings.
    """
    import yaml

    try:
        documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_loader()))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error})", "check --config") from error
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"{path} is not valid YAML: {detail}", "correct the file") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply", "correct the file") from error
    if not _is_finite(documents):
        raise UsageError(f"{path} holds a value that contains itself, or is nested too deeply", "correct the file")
    found = [document for document in documents if document is not None]
    for document in found:
        if not isinstance(document, dict):
            raise UsageError(
                f"{path} holds a {type(document).__name__}, not key: value pairs", "see configs/ for recipes"
            )
    return found


def _is_finite(value: object, above: tuple[int, ...] = (), seen: set[int] | None = None) -> bool:
    """Whether a value is finite and not too deep: an anchor that holds its own alias is not. Each is visited once."""
    seen = set() if seen is None else seen
    if not isinstance(value, dict | list) or id(value) in seen:
        return True
    if id(value) in above or len(above) > DEEPEST:
        return False
    inner = value.values() if isinstance(value, dict) else value
    found = all(_is_finite(item, (*above, id(value)), seen) for item in inner)
    seen.add(id(value))
    return found


def to_yaml(values: JsonMapping) -> str:
    """Return a dumped or recorded configuration as a recipe that reruns the same job."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """The safe dumper, the counterpart of our loader."""

    return yaml.dump(dict(values), Dumper=_with_numbers(Dumper), sort_keys=False, allow_unicode=True)


def apply_sets(values: JsonObject, sets: Iterable[str]) -> JsonObject:
    """Apply `a.b=c` assignments to a nested mapping; return a new one."""
    result = _copied(values)
    for item in sets:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {item!r} is not KEY=VALUE", "write for instance --set learning_rate=1e-6")
        *parents, last = path.split(".")
        node = result
        for key in parents:
            node = node.setdefault(_spelt(key, node), {})
            if not isinstance(node, dict):
                raise UsageError(f"--set {item!r}: '{key}' is a single value", "set it as a whole")
        node[_spelt(last, node)] = parse_value(text)
    return result


def _copied(value: JsonObject) -> JsonObject:
    return {key: _copied(item) if isinstance(item, dict) else item for key, item in value.items()}


def _spelt(key: str, node: Mapping[str, object]) -> str:
    """Return a key in the spelling of the file, or with underscores as in all our keys."""
    return key if key in node else key.replace("-", "_")
