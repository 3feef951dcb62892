"""Merges in a YAML file, as named steps of one request each. Our own keys are read here, mergekit's in `mergekit`.

A number is plain, `{layers: [0, .3, 1]}` (a gradient over the depth of the model), or a list of rules
`[{match: regex, value: x}, {match: regex, layers: [..]}, default]`; the first that fits a tensor's name counts.
Paths are taken from the current directory when they exist there, else from the folder of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from math import isfinite
from pathlib import Path
from typing import Any

from gemma2.core.errors import UsageError
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.yaml_files import apply_sets, closest, read_documents
from gemma2.merging.methods.parameters import Number, Rule, Schedule
from gemma2.merging.methods.request import MergeRequest

__all__ = ["Place", "Recipe", "Step", "plain_number", "read_recipe"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One merge. A model or base whose path is the name in `needs` is the output of that step.

    name   "" for the only merge of a file that names none
    notes  what the file says that has no effect on this merge
    """

    name: str
    request: MergeRequest
    needs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The merges of a file, every one after those whose outputs it takes."""

    path: Path
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Place:
    """A spot in a file, for messages and for finding what it names.

    names  of the steps of the file
    """

    file: Path
    names: frozenset[str] = frozenset()
    key: str = ""

    def at(self, key: str | int) -> Place:
        """A key or an index below."""
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if self.key else key
        return Place(self.file, self.names, f"{self.key}{step}")

    def wrong(self, what: str, mend: str) -> UsageError:
        """The error of a value at this spot."""
        return UsageError(f"{self.key or 'the file'} {what} in {self.file}", mend)

    def unknown(self, key: Any, valid: Iterable[str]) -> UsageError:
        """The error of a key that is none."""
        spot = self.at(printable(str(key)))
        return UsageError(f"unknown key '{spot.key}' in {self.file}", closest(str(key), valid))

    def model(self, value: Any) -> Path:
        """A directory, MODEL+ADAPTER, a hub id, or the name of a step."""
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"is {shown(value)}, not a model", "give a directory or a hub id")
        if value in self.names or Path(value).exists() or (self.file.parent / value).exists():
            return Path(self._found(value))
        model, plus, adapter = value.rpartition("+")
        return Path(f"{self._found(model)}{plus}{self._found(adapter)}")

    def _found(self, text: str) -> str:
        here = not text or text in self.names or Path(text).exists()
        beside = self.file.parent / text
        return text if here or not beside.exists() else str(beside)


def shown(value: Any) -> str:
    """A value of a file on one line of a message."""
    text = repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def read_recipe(path: Path, sets: Iterable[str] = (), threads: int | None = None) -> Recipe:
    """The merges that a file asks for, in the order in which they can run.

    `sets` are KEY=VALUE assignments to the keys of the file, `threads` of every request.
    Raises InputError for a file that cannot be read, UsageError that names file, key and mend for everything else.
    No model is opened.
    """
    from .mergekit import is_mergekit, mergekit_steps

    documents = read_documents(path)
    if not documents:
        raise UsageError(f"{path} is empty", "see docs/merging.md for what it may hold")
    changes = tuple(sets)
    if changes and len(documents) > 1:
        raise UsageError(f"--set is for one YAML document, {path} holds {len(documents)}", "change the file")
    documents = [apply_sets(document, changes) for document in documents]
    if any(is_mergekit(document) for document in documents):
        steps = mergekit_steps(documents, Place(path))
    elif len(documents) > 1:
        raise UsageError(f"{path} holds {len(documents)} YAML documents", "name several merges below 'steps'")
    else:
        steps = _own_steps(documents[0], Place(path))
    if threads is not None:
        steps = [replace(step, request=replace(step.request, threads=threads)) for step in steps]
    return Recipe(path=path, steps=_ordered(steps, path))


def _own_steps(document: Mapping[str, Any], place: Place) -> list[Step]:
    """The steps of a file in our keys."""
    if "steps" not in document:
        return [_step("", document, place)]
    others = set(document) - {"steps"}
    if others:
        raise place.wrong(f"has '{min(map(str, others))}' beside 'steps'", "give it to every step that needs it")
    steps = document["steps"]
    if not isinstance(steps, dict) or not steps:
        raise place.at("steps").wrong(f"is {shown(steps)}", "write NAME: {method: ..., models: [...]}")
    inside = Place(place.file, frozenset(map(str, steps)), "steps")
    return [_step(check_name(name, inside), values, inside.at(name)) for name, values in steps.items()]


def check_name(name: Any, place: Place) -> str:
    """A step's name is a directory's name below --out."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise place.wrong(f"has a step named {shown(name)}", "use letters, digits, '.', '_' and '-'")
    return name


def _step(name: str, values: Any, place: Place) -> Step:
    if not isinstance(values, dict):
        raise place.wrong(f"is {shown(values)}", "write {method: ..., models: [...]}")
    request = MergeRequest(**_fields(values, place))
    return Step(name=name, request=request, needs=needs_of(request, place.names))


def needs_of(request: MergeRequest, names: Iterable[str]) -> tuple[str, ...]:
    """The steps whose outputs a request takes."""
    used = [*request.models, *([request.base] if request.base else [])]
    heads = dict.fromkeys(str(path).partition("+")[0] for path in used)
    return tuple(head for head in heads if head in frozenset(names))


def _ordered(steps: list[Step], path: Path) -> tuple[Step, ...]:
    """Every step after those that it needs."""
    by_name = {step.name: step for step in steps}
    try:
        order = TopologicalSorter({step.name: step.needs for step in steps}).static_order()
        ordered = tuple(by_name[name] for name in order)
    except CycleError as error:
        raise UsageError(
            f"steps of {path} need each other: {' <- '.join(error.args[1])}", "break the circle"
        ) from error
    for step in ordered:
        for name in step.needs:
            if len(by_name[name].request.etas) > 1:
                raise UsageError(
                    f"step '{step.name}' of {path} takes '{name}', which has several outputs", f"give {name} one eta"
                )
    return ordered


# --- the keys of one merge --------------------------------------------------------------------------------------------

LISTS = {"weights": "weight", "density": "density", "gamma": "gamma", "epsilon": "epsilon"}


def _fields(values: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The fields of a request from the keys of one merge."""
    for key in values:
        if key not in READERS:
            raise place.unknown(key, READERS)
    for key in ("method", "models"):
        if values.get(key) is None:
            raise place.wrong(f"has no '{key}'", f"add {key}: ...")
    found = {key: READERS[key](value, place.at(key)) for key, value in values.items() if value is not None}
    paths, own = _models(values["models"], place.at("models"))
    for field in own:
        if field in found:
            raise place.at(field).wrong("is given for all models and for single ones", "give one of the two")
    return {RENAMED.get(key, key): value for key, value in {**found, **own, "models": paths}.items()}


def _models(values: Any, place: Place) -> tuple[tuple[Path, ...], dict[str, tuple[Number, ...]]]:
    """The models, and the fields that their entries give: all of them, or none."""
    if not isinstance(values, list) or not values:
        raise place.wrong(f"is {shown(values)}", "give a list of models")
    paths, own = [], []
    for index, value in enumerate(values):
        here = place.at(index)
        entry = value if isinstance(value, dict) else {"model": value}
        for key in entry:
            if key != "model" and key not in LISTS.values():
                raise here.unknown(key, ["model", *LISTS.values()])
        if "model" not in entry:
            raise here.wrong("has no 'model'", "add model: DIR")
        paths.append(here.at("model").model(entry["model"]) if isinstance(value, dict) else here.model(value))
        own.append({key: number(item, here.at(key)) for key, item in entry.items() if key != "model"})
    lists = {}
    for field, key in LISTS.items():
        having = [key in entry for entry in own]
        if any(having) and not all(having):
            raise place.at(having.index(False)).wrong(f"has no '{key}', others have", "give it for every model")
        if any(having):
            lists[field] = tuple(entry[key] for entry in own)
    return tuple(paths), lists


def plain_number(value: Any, place: Place) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise place.wrong(f"is {shown(value)}, not a number", "give a number")
    return float(value)


def number(value: Any, place: Place) -> Number:
    """A number, a gradient, or a list of rules."""
    if isinstance(value, dict):
        return Schedule((_rule(value, place),))
    if not isinstance(value, list):
        return plain_number(value, place)
    if not is_rules(value):
        raise place.wrong("is a list", "a gradient over the layers is {layers: [...]}")
    rules: list[Rule] = []
    for index, item in enumerate(value):
        rules.append(_rule(item if isinstance(item, dict) else {"value": item}, place.at(index)))
        if rules[-1].pattern is None and index + 1 < len(value):
            raise place.at(index + 1).wrong("comes after a rule that fits every tensor", "put that one last")
    return Schedule(tuple(rules))


def is_rules(value: Any) -> bool:
    """Whether a list holds rules, rather than one number per model."""
    return isinstance(value, list) and any(
        isinstance(item, dict) and {"match", "value"} & item.keys() for item in value
    )


def _rule(value: Mapping[str, Any], place: Place) -> Rule:
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
            raise place.at("match").wrong(f"is no regular expression ({error})", "correct it") from error
    points = value.get("layers", [value.get("value")])
    spot = place.at("layers" if "layers" in value else "value")
    if not isinstance(points, list) or not points:
        raise spot.wrong(f"is {shown(points)}", "give a list of numbers")
    return Rule(tuple(plain_number(point, spot) for point in points), pattern)


def _several(value: Any, place: Place) -> tuple[Number, ...]:
    """One number, or one for each model or output."""
    if not isinstance(value, list) or is_rules(value):
        return (number(value, place),)
    return tuple(number(item, place.at(index)) for index, item in enumerate(value))


def _integer(value: Any, place: Place) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise place.wrong(f"is {shown(value)}, not a whole number", "give a whole number")
    return value


def _flag(value: Any, place: Place) -> bool:
    if not isinstance(value, bool):
        raise place.wrong(f"is {shown(value)}, not true or false", "give true or false")
    return value


def _text(value: Any, place: Place) -> str:
    if not isinstance(value, str):
        raise place.wrong(f"is {shown(value)}, not a name", "give a name")
    return value


def _tokenizer(value: Any, place: Place) -> str:
    return value if value in ("base", "union") else str(place.model(value))


# One reader per key; `models` is read with what its entries say.
READERS: dict[str, Callable[[Any, Place], Any]] = {
    "method": _text,
    "models": lambda value, place: value,
    "base": lambda value, place: place.model(value),
    "t": number,
    "eta": _several,
    "weights": _several,
    "decay": plain_number,
    "scale": number,
    "density": _several,
    "gamma": _several,
    "epsilon": _several,
    "normalize": _flag,
    "rescale": _flag,
    "seed": _integer,
    "iterations": _integer,
    "tolerance": plain_number,
    "granularity": _text,
    "tokenizer": _tokenizer,
    "dtype": _text,
}
RENAMED = {"eta": "etas"}
