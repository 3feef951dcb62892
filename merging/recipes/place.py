"""A spot in a file of merges, for messages and for finding what it names; and the readers of its values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from gemma2.core.errors import UsageError
from gemma2.core.home import text_at_home
from gemma2.core.json_files import JsonMapping
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.yaml_files import closest, given_by, place_of
from gemma2.merging.methods.option import Option, OptionValue
from gemma2.merging.methods.parameters import Number, Rule, Schedule
from gemma2.merging.methods.request import TokenSource, VocabularyChoice

__all__ = [
    "Place",
    "PlaceError",
    "check_name",
    "chosen_file",
    "flag",
    "input_records",
    "is_rules",
    "layer_range",
    "number",
    "plain_number",
    "read_option",
    "several",
    "several_texts",
    "shown",
    "text",
    "tokenizer",
    "vocabulary",
    "whole_number",
]


class PlaceError(UsageError):
    """An error at a spot of a file of merges. `keys` and `document`: the spot, as `Place` has them."""

    def __init__(
        self, what: str, hint: str = "", where: str = "", keys: tuple[str | int, ...] = (), document: int = 0
    ) -> None:
        super().__init__(what, hint, where)
        self.keys = keys
        self.document = document


@dataclass(frozen=True)
class Place:
    """A spot in a file, for messages and for finding what it names.

    names     of the steps of the file
    key       the spot as messages name it
    keys      from the top of its YAML document
    document  number of that document
    sets      KEY=VALUE assignments that changed the file
    near      paths are taken from the folder of the file first: it is the recipe of an output
    """

    file: Path
    names: frozenset[str] = frozenset()
    key: str = ""
    keys: tuple[str | int, ...] = ()
    document: int = 0
    sets: tuple[str, ...] = ()
    near: bool = False

    def at(self, key: str | int) -> Place:
        """A key or an index below."""
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if self.key else key
        return replace(self, key=f"{self.key}{step}", keys=(*self.keys, key))

    def where(self, *, of_key: bool = False) -> str:
        """`FILE:LINE:COLUMN`, or the `--set` that gave the value; of what is not a file, its name."""
        given = given_by(self.sets, self.keys)
        if given is not None:
            return f"--set {given}"
        return place_of(self.file, self.keys, self.document, of_key=of_key)

    def wrong(self, what: str, hint: str) -> PlaceError:
        """The error of a value at this spot."""
        where = self.where()
        return PlaceError(f"{self.key or 'the file'} {what} in {where}", hint, where, self.keys, self.document)

    def unknown(self, key: object, valid: Iterable[str]) -> PlaceError:
        """Error for an unknown key."""
        spot = self.at(printable(str(key)))
        keys = (*self.keys, str(key))
        where = replace(self, keys=keys).where(of_key=True)
        what = f"unknown key '{spot.key}' in {where}"
        return PlaceError(what, closest(str(key), valid), where, keys, self.document)

    def model(self, value: object) -> Path:
        """A directory, MODEL+ADAPTER, a hub id, or the name of a step."""
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"is {shown(value)}, not a model", "give a directory or a hub id")
        value = text_at_home(value)
        if value in self.names or Path(value).exists() or (self.file.parent / value).exists():
            return Path(self._found(value))
        model, plus, adapter = value.rpartition("+")
        return Path(f"{self._found(model)}{plus}{self._found(adapter)}")

    def _found(self, text: str) -> str:
        here = not text or text in self.names or Path(text).exists()
        neighbour = self.file.parent / text
        if self.near and text and text not in self.names and neighbour.exists():
            return str(neighbour)
        return text if here or not neighbour.exists() else str(neighbour)


def shown(value: object) -> str:
    """A value of a file on one line of a message."""
    text = repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def check_name(name: object, place: Place) -> str:
    """A step's name is a directory's name below --out."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise place.wrong(f"has a step named {shown(name)}", "use letters, digits, '.', '_' and '-'")
    return name


def plain_number(value: object, place: Place) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise place.wrong(f"is {shown(value)}, not a number", "give a number")
    return float(value)


def number(value: object, place: Place) -> Number:
    """A number, a gradient (a list, or `{layers: [..]}`), or a list of rules."""
    if isinstance(value, dict):
        return Schedule((_rule(value, place),))
    if not isinstance(value, list):
        return plain_number(value, place)
    if not is_rules(value):
        return Schedule((_rule({"layers": value}, place),))
    rules: list[Rule] = []
    for index, item in enumerate(value):
        rules.append(_rule(item if isinstance(item, dict) else {"value": item}, place.at(index)))
        if rules[-1].pattern is None and index + 1 < len(value):
            raise place.at(index + 1).wrong("comes after a rule that fits every tensor", "put that one last")
    return Schedule(tuple(rules))


def is_rules(value: object) -> bool:
    """Whether a list holds rules, rather than one number per model."""
    return isinstance(value, list) and any(
        isinstance(item, dict) and {"match", "value"} & item.keys() for item in value
    )


def _rule(value: JsonMapping, place: Place) -> Rule:
    """`{match: .., value: ..}` or `{match: .., layers: [..]}`; without match it fits every tensor."""
    for key in value:
        if key not in ("match", "value", "layers"):
            raise place.unknown(key, ["match", "value", "layers"])
    if ("value" in value) == ("layers" in value):
        raise place.wrong("needs 'value' or 'layers', and not both", "layers: [a, b] is a gradient")
    pattern = value.get("match")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise place.at("match").wrong(f"is not a regular expression ({error})", "correct it") from error
    points = value.get("layers", [value.get("value")])
    spot = place.at("layers" if "layers" in value else "value")
    if not isinstance(points, list) or not points:
        raise spot.wrong(f"is {shown(points)}", "give a list of numbers")
    return Rule(tuple(plain_number(point, spot) for point in points), pattern)


def several(value: object, place: Place) -> tuple[Number, ...]:
    """One number, or one for each model or output."""
    if not isinstance(value, list) or is_rules(value):
        return (number(value, place),)
    return tuple(number(item, place.at(index)) for index, item in enumerate(value))


def whole_number(value: object, place: Place) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise place.wrong(f"is {shown(value)}, not a whole number", "give a whole number")
    return value


def flag(value: object, place: Place) -> bool:
    if not isinstance(value, bool):
        raise place.wrong(f"is {shown(value)}, not true or false", "give true or false")
    return value


def text(value: object, place: Place) -> str:
    if not isinstance(value, str):
        raise place.wrong(f"is {shown(value)}, not a name", "give a name")
    return value


def read_option(option: Option, value: object, place: Place) -> OptionValue:
    """The value of an option of merge methods, as a merge file, a stage or a flag gives it.

    Raises UsageError naming the place.
    """
    if option.kind != "number":
        return flag(value, place) if option.kind == "switch" else whole_number(value, place)
    if option.per:
        return several(value, place)
    return number(value, place) if option.varies else plain_number(value, place)


def tokenizer(value: object, place: Place) -> str:
    return value if value in ("base", "union") else str(place.model(value))


def input_records(value: object, place: Place) -> tuple[JsonMapping, ...]:
    """Role and identity of each input of a recipe."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise place.wrong(f"is {shown(value)}", "restore the recipe, or take 'inputs' out")
    return tuple(value)


def vocabulary(value: object, place: Place) -> VocabularyChoice:
    """Rows of single tokens, and a multiple of which the number of rows is."""
    if not isinstance(value, dict) or not isinstance(value.get("tokens", []), list):
        raise place.wrong(f"is {shown(value)}", "write {tokens: [...], multiple: N}")
    only = {"token", "model", "force", "other", "index"}
    found = []
    for index, one in enumerate(value.get("tokens", [])):
        here = place.at("tokens").at(index)
        if not isinstance(one, dict) or "token" not in one or one.keys() - only:
            raise here.wrong(f"is {shown(one)}", "write {token: TEXT, model: DIR}")
        model = one.get("model")
        found.append(TokenSource(**{**one, "model": None if model is None else str(here.model(model))}))
    multiple = value.get("multiple")
    return VocabularyChoice(tuple(found), None if multiple is None else whole_number(multiple, place.at("multiple")))


def several_texts(value: object, place: Place) -> tuple[str, ...]:
    """One name or a list of names."""
    return tuple(text(item, place) for item in (value if isinstance(value, list) else [value]))


def chosen_file(value: object, place: Place) -> str:
    """The number of a model from 1, "base", or a file; of a chat template also "auto", a name, or Jinja text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = text(value, place)
    plain = name == "base" or name.isdecimal() or "{" in name
    there = not plain and any(path.is_file() for path in (Path(text_at_home(name)), place.file.parent / name))
    return str(place.model(name)) if there else name


def layer_range(value: Any, place: Place) -> tuple[int, int]:  # noqa: ANN401
    """First layer and end of a run of layers."""
    whole = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise place.wrong(f"is {shown(value)}", "give [first, end], the end not included")
    return value[0], value[1]
