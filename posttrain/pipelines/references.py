"""References in a pipeline file: `${vars.X}`, `${matrix.X}`, `${STAGE.out}`, `${STAGE.summary.KEY}`. Pure.

The first three are replaced when the pipeline is compiled. A summary is known when its stage is done, so such a
reference stays in the text until the stage that reads it starts. `$${` is a plain `${`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.core.yaml_files import closest, parse_value

__all__ = ["NULL", "condition_holds", "filled", "lookup", "parse_condition", "references", "replaced", "texts"]


class _Null:
    """The value of a reference to a null; None means that the reference is not known yet."""

    def __str__(self) -> str:
        return "null"


NULL = _Null()

REFERENCE = re.compile(r"(?<!\$)\$\{([^{}]*)\}")
LONGEST = 200  # characters of a condition in an error
SIGN = re.compile(r"==|!=|<=|>=|<|>")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: bool(a == b),
    "!=": lambda a, b: bool(a != b),
    "<=": lambda a, b: bool(a <= b),
    ">=": lambda a, b: bool(a >= b),
    "<": lambda a, b: bool(a < b),
    ">": lambda a, b: bool(a > b),
}


def texts(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """(place, text) of every text in a nested value; a place reads `options.data.0`."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from texts(item, f"{place}.{number}" if place else str(number))


def references(text: str) -> list[str]:
    """The texts between the braces, in order."""
    return REFERENCE.findall(text)


def replaced(value: object, of: Callable[[str], object]) -> Any:  # noqa: ANN401
    """A nested value with every reference replaced by `of(reference)`; None leaves a reference as it is, NULL is null.

    A text that is nothing but one reference becomes the value itself, whatever its type; inside a longer text it
    becomes text. A list in place of an item is spliced into the list around it.
    """
    if isinstance(value, str):
        return _replaced_text(value, of)
    if isinstance(value, Mapping):
        return {key: replaced(item, of) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items: list[object] = []
        for item in value:
            found = replaced(item, of)
            items += found if isinstance(found, list) and isinstance(item, str) else [found]
        return items
    return value


def _replaced_text(text: str, of: Callable[[str], object]) -> Any:  # noqa: ANN401
    names = references(text)
    if not names:
        return text
    whole = REFERENCE.fullmatch(text)
    if whole:
        found = of(whole[1])
        if found is NULL:
            return None
        return text if found is None else list(found) if isinstance(found, tuple) else found
    values = {name: of(name) for name in names}
    lists = [name for name, value in values.items() if isinstance(value, list | tuple)]
    if len(lists) > 1:
        raise UsageError(f"'{text}' holds two lists (${{{lists[0]}}}, ${{{lists[1]}}})", "name one of them per text")
    if lists:
        return [_joined(text, values | {lists[0]: item}) for item in cast(Sequence[object], values[lists[0]])]
    return _joined(text, values)


def _joined(text: str, values: JsonMapping) -> str:
    return REFERENCE.sub(lambda found: found[0] if values[found[1]] is None else str(values[found[1]]), text)


def filled(value: object) -> object:
    """A nested value in which `$${` is replaced by `${`."""
    if isinstance(value, str):
        return value.replace("$${", "${")
    if isinstance(value, Mapping):
        return {key: filled(item) for key, item in value.items()}
    return [filled(item) for item in value] if isinstance(value, list | tuple) else value


def lookup(values: JsonMapping, path: list[str], what: str) -> object:
    """The value at a path of keys, NULL for a null. Raises UsageError that names the first missing key."""
    current: object = values
    for key in path:
        if isinstance(current, list) and key.isdigit() and int(key) < len(current):
            current = current[int(key)]
        elif isinstance(current, Mapping) and key in current:
            current = current[key]
        else:
            raise UsageError(f"${{{what}}}: there is no '{key}'", _there(current, key))
    return NULL if current is None else current


def _there(value: object, key: str) -> str:
    """The names next to which `key` was looked for."""
    if isinstance(value, Mapping):
        return closest(key, map(str, value)) if value else "no names are defined there"
    return f"it is a list of {len(value)}, counted from 0" if isinstance(value, list) else "it is a single value"


def parse_condition(text: str) -> tuple[str, str, str]:
    """(left, sign, right) of `LEFT < RIGHT`. Raises UsageError for anything else."""
    whole = text.strip()
    found = SIGN.search(whole, 1)  # one pass: an expression with `.+?` and blanks around it would try every split
    left, right = (whole[: found.start()].strip(), whole[found.end() :].strip()) if found else ("", "")
    if found is None or not left or not right:
        raise UsageError(
            f"when: {text[:LONGEST]!r} is not a comparison", "write for instance ${front.summary.flat} < 1"
        )
    return left, found[0], right


def condition_holds(text: str, of: Callable[[str], object]) -> bool:
    """Whether `LEFT < RIGHT` holds, with references replaced by `of`. Both sides are YAML values."""
    left, sign, right = parse_condition(text)
    sides = [replaced(side, of) for side in (left, right)]
    a, b = (parse_value(side) if isinstance(side, str) else side for side in sides)
    try:
        return COMPARE[sign](a, b)
    except TypeError as error:
        raise UsageError(f"when: {text!r} compares {a!r} with {b!r}", "compare numbers with numbers") from error
