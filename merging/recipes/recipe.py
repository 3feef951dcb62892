"""Merges in a YAML file, as named steps of one request each. Our own keys are read here, mergekit's in `mergekit`.

A number is plain, `{layers: [0, .3, 1]}` (a gradient over the depth of the model), or a list of rules
`[{match: regex, value: x}, {match: regex, layers: [..]}, default]`; the first that fits a tensor's name counts.
Paths are taken from the current directory when they exist there, else from the folder of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.yaml_files import apply_sets, read_documents
from gemma2.merging.methods.option import OPTIONS, Option
from gemma2.merging.methods.parameters import Number
from gemma2.merging.methods.request import FILES, MergeRequest, Slice

from .mergekit import is_mergekit, mergekit_steps
from .place import (
    Place,
    check_name,
    chosen_file,
    flag,
    input_records,
    layer_range,
    number,
    read_option,
    several_texts,
    shown,
    text,
    tokenizer,
    vocabulary,
)
from .step import Recipe, Step, needs_of

__all__ = ["merges_of", "read_recipe", "read_slices"]


def read_recipe(
    path: Path, sets: Iterable[str] = (), chosen: JsonMapping | None = None, allow_config: tuple[str, ...] = ()
) -> Recipe:
    """The merges that a file asks for, in the order in which they can run.

    sets          KEY=VALUE assignments to the keys of the file
    chosen        fields of every request that are not taken from the file, by name
    allow_config  keys of config.json that may differ, besides those that the file allows
    Raises InputError for a file that cannot be read, UsageError that names file, key and fix for everything else.
    No model is opened.
    """
    documents = read_documents(path)
    if not documents:
        raise UsageError(f"{path} is empty", "see docs/merging.md for what it may hold")
    changes = tuple(sets)
    if changes and len(documents) > 1:
        raise UsageError(f"--set is for one YAML document, {path} holds {len(documents)}", "change the file")
    documents = [apply_sets(document, changes) for document in documents]
    steps = merges_of(documents, Place(path, sets=changes))
    for name, value in (chosen or {}).items():
        steps = [replace(step, request=replace(step.request, **{name: value})) for step in steps]
    if allow_config:
        steps = [_allowing(step, allow_config) for step in steps]
    return Recipe(path=path, steps=_ordered(steps, path))


def merges_of(documents: Sequence[JsonMapping], place: Place) -> list[Step]:
    """The steps of the documents of a file, in the order of the file. Raises PlaceError for the first fault."""
    if "stages" in documents[0]:
        raise place.at("stages").wrong("is a key of pipelines", f"gemma2 pipeline run {place.file}")
    if any(is_mergekit(document) for document in documents):
        return mergekit_steps(documents, place)
    if len(documents) > 1:
        raise UsageError(f"{place.file} holds {len(documents)} YAML documents", "name several merges below 'steps'")
    return _own_steps(documents[0], replace(place, near="inputs" in documents[0]))


def _allowing(step: Step, keys: tuple[str, ...]) -> Step:
    both = tuple(dict.fromkeys((*step.request.allow_config, *keys)))
    return replace(step, request=replace(step.request, allow_config=both))


def _own_steps(document: JsonMapping, place: Place) -> list[Step]:
    """The steps of a file in our keys."""
    if "steps" not in document:
        return [_step("", document, place)]
    others = set(document) - {"steps"}
    if others:
        raise place.wrong(f"has '{min(map(str, others))}' next to 'steps'", "give it to every step that needs it")
    steps = document["steps"]
    if not isinstance(steps, dict) or not steps:
        raise place.at("steps").wrong(f"is {shown(steps)}", "write NAME: {method: ..., models: [...]}")
    inside = replace(place, names=frozenset(map(str, steps))).at("steps")
    return [_step(check_name(name, inside), values, inside.at(name)) for name, values in steps.items()]


def _step(name: str, values: object, place: Place) -> Step:
    if not isinstance(values, dict):
        raise place.wrong(f"is {shown(values)}", "write {method: ..., models: [...]}")
    request = MergeRequest(**_fields(values, place))
    return Step(name=name, request=request, needs=needs_of(request, place.names), place=place)


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
                where = step.place.where() if step.place else str(path)
                what = f"step '{step.name}' takes '{name}', which has several outputs, in {where}"
                raise UsageError(what, f"give {name} one eta", where)
    return ordered


# --- the keys of one merge --------------------------------------------------------------------------------------------


def _keys() -> list[str]:
    """Every key that a merge may have: those of all methods, then the options in the table."""
    return [*COMMON, *OPTIONS]


def _of_one_model(option: Option) -> str:
    """The key of an option in the entry of one model: `weights` is one `weight` each."""
    return option.name.removesuffix("s")


def _fields(values: JsonMapping, place: Place) -> JsonObject:
    """The fields of a request from the keys of one merge."""
    for key in values:
        if key not in COMMON and key not in OPTIONS:
            raise place.unknown(key, _keys())
    for key in ("method", "models"):
        if values.get(key) is None:
            raise place.wrong(f"has no '{key}'", f"add {key}: ...")
    found = {key: _read(key, value, place.at(key)) for key, value in values.items() if value is not None}
    paths, own = _models(values["models"], place.at("models"))
    for field in own:
        if field in found:
            raise place.at(field).wrong("is given for all models and for single ones", "give one of the two")
    found |= {**own, "models": paths}
    if "slices" in found:
        found["slices"] = read_slices(found["slices"], place.at("slices"), paths, found.get("base"))
    if "inputs" in found:
        found["recorded"] = found.pop("inputs")
    return {OPTIONS[key].attribute if key in OPTIONS else key: value for key, value in found.items()}


def _read(key: str, value: object, place: Place) -> Any:  # noqa: ANN401
    return COMMON[key](value, place) if key in COMMON else read_option(OPTIONS[key], value, place)


def _models(values: object, place: Place) -> tuple[tuple[Path, ...], dict[str, tuple[Number, ...]]]:
    """The models, and the fields that their entries give: all of them, or none."""
    if not isinstance(values, list) or not values:
        raise place.wrong(f"is {shown(values)}", "give a list of models")
    single = {_of_one_model(option): option.name for option in OPTIONS.values() if option.per == "model"}
    paths, own = [], []
    for index, value in enumerate(values):
        here = place.at(index)
        entry = value if isinstance(value, dict) else {"model": value}
        for key in entry:
            if key != "model" and key not in single:
                raise here.unknown(key, ["model", *single])
        if "model" not in entry:
            raise here.wrong("has no 'model'", "add model: DIR")
        paths.append(here.at("model").model(entry["model"]) if isinstance(value, dict) else here.model(value))
        own.append({key: number(item, here.at(key)) for key, item in entry.items() if key != "model"})
    lists = {}
    for key, field in single.items():
        having = [key in entry for entry in own]
        if any(having) and not all(having):
            raise place.at(having.index(False)).wrong(f"has no '{key}', others have", "give it for every model")
        if any(having):
            lists[field] = tuple(entry[key] for entry in own)
    return tuple(paths), lists


def read_slices(value: object, place: Place, models: Sequence[Path], base: Path | None) -> tuple[Slice, ...]:
    """Runs of layers stacked on each other: `[{sources: [{model: a, layers: [0, 4]}, ..], t: 0.3}, ..]`.

    A source is one of `models`, by its path or its number from 0, or the base
    with the layers that the others are compared with. Every other key is an
    option that differs in this slice. Raises UsageError naming the place.
    """
    if not isinstance(value, list) or not value:
        raise place.wrong(f"is {shown(value)}", "write [{sources: [{model: DIR, layers: [first, end]}]}]")
    return tuple(_slice(item, place.at(index), models, base) for index, item in enumerate(value))


def _named_source(value: object, place: Place, models: Sequence[Path]) -> Path:
    if type(value) is int and 0 <= value < len(models):
        return models[value]
    return place.model(value)


def _slice(value: object, place: Place, models: Sequence[Path], base: Path | None) -> Slice:
    if not isinstance(value, dict) or not isinstance(value.get("sources"), list) or not value["sources"]:
        raise place.wrong("has no list of 'sources'", "write {sources: [{model: DIR, layers: [first, end]}]}")
    layers: list[tuple[int, int, int]] = []
    of_base = None
    for index, source in enumerate(value["sources"]):
        here = place.at("sources").at(index)
        if not isinstance(source, dict) or source.keys() != {"model", "layers"}:
            raise here.wrong(f"is {shown(source)}", "write {model: DIR, layers: [first, end]}")
        span = layer_range(source["layers"], here.at("layers"))
        path = _named_source(source["model"], here.at("model"), models)
        if path == base:
            of_base = span
        elif path in models:
            layers.append((models.index(path), *span))
        else:
            raise here.at("model").wrong(f"{path} is neither one of the models nor the base", "add it to 'models'")
    changes = {}
    for key, item in value.items():
        if key != "sources":
            if key not in OPTIONS:
                raise place.unknown(key, ["sources", *OPTIONS])
            changes[OPTIONS[key].attribute] = read_option(OPTIONS[key], item, place.at(key))
    return Slice(layers=tuple(layers), base=of_base, changes=changes)


COMMON: dict[str, Callable[[Any, Place], Any]] = {
    "method": text,
    "models": lambda value, place: value,  # read with what its entries say
    "base": lambda value, place: place.model(value),
    "granularity": text,
    "tokenizer": tokenizer,
    "allow_config": several_texts,
    **dict.fromkeys(FILES, chosen_file),
    "vocabulary": vocabulary,
    "inputs": input_records,
    "dtype": text,
    "stream": flag,
    "slices": lambda value, place: value,  # read when the models are known
}
