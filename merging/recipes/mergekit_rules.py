"""mergekit's values that differ between tensors, as rules of ours: scalars, gradients, and lists of {filter, value}.

Deviation: in a slice, a filter that names a layer is compared with `model.layers.N.`, whatever the architecture calls
its layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma2.merging.methods.parameters import Number, Rule, Schedule, gradient

from .place import Place, plain_number, shown

__all__ = ["Rules", "complement", "everywhere", "only_keys", "per_layer", "read_model", "read_rules"]

LAYER = r"\b(?:layers|layer|h|blocks)\."

Rules = list[tuple[str | None, list[float]]]  # (filter, points)


def only_keys(value: object, keys: Sequence[str], place: Place) -> None:
    """Refuse a value that is not a mapping, or has other keys."""
    if not isinstance(value, dict):
        raise place.wrong(f"is {shown(value)}", f"write {{{keys[0]}: ...}}")
    for key in value:
        if key not in keys:
            raise place.unknown(key, keys)


def read_model(value: object, place: Place) -> Path:
    """A model as a text, or as {model: {path, revision}, lora: {path, revision}}."""
    if not isinstance(value, dict):
        return place.model(value)
    only_keys(value, ("model", "lora", "override_architecture"), place)
    model = _reference(value.get("model"), place.at("model"))
    lora = value.get("lora")
    return place.model(model if lora is None else f"{model}+{_reference(lora, place.at('lora'))}")


def _reference(value: object, place: Place) -> str:
    if isinstance(value, str):
        return value
    only_keys(value, ("path", "revision"), place)
    path, revision = (value.get("path"), value.get("revision")) if isinstance(value, dict) else (None, None)
    if not isinstance(path, str):
        raise place.wrong("has no 'path'", "add path: DIR")
    return path if revision is None or Path(path).exists() else f"{path}@{revision}"  # a directory has one state


def read_rules(value: object, place: Place) -> Rules:
    """A scalar, a gradient, or rules of {filter, value}; the first that fits counts."""
    if isinstance(value, dict):
        value = [value]
    if not (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        return [(None, _points(value, place))]
    rules: Rules = []
    for index, item in enumerate(value):
        here = place.at(index)
        only_keys(item, ("filter", "value"), here)
        text = item.get("filter")
        if text is not None and not isinstance(text, str):
            raise here.at("filter").wrong(f"is {shown(text)}", "give a part of a tensor's name")
        rules.append((None if text == "*" else text, _points(item.get("value"), here.at("value"))))
    return rules


def _points(value: object, place: Place) -> list[float]:
    values = value if isinstance(value, list) and value else [value]
    return [plain_number(_numeric(item), place) for item in values]


def _numeric(value: object) -> Any:  # noqa: ANN401
    """mergekit takes "1" for 1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def complement(t: Number) -> Number:
    """1 - t."""
    if isinstance(t, Schedule):
        return Schedule(tuple(Rule(tuple(1.0 - point for point in rule.points), rule.pattern) for rule in t.rules))
    return 1.0 - t


def everywhere(text: str | None, points: Sequence[float]) -> list[Rule]:
    """A rule for a model of layers one to one."""
    pattern = None if text is None else re.escape(text)
    if len(points) == 1:
        return [Rule(tuple(points), pattern)]
    inside = rf"{LAYER}\d+\." if pattern is None else rf"^(?=.*{LAYER}\d+\.).*{pattern}"
    return [Rule(tuple(points), inside), Rule((points[0],), pattern)]


def per_layer(
    text: str | None, points: Sequence[float], layers: tuple[int, int], start: int, origin: int
) -> list[Rule]:
    """A rule for a slice: one per layer of the output, since filters read the source's names and numbers."""
    if text is None and len(points) == 1:
        return [Rule(tuple(points))]
    count = layers[1] - layers[0]
    rules = []
    for index in range(count):
        depth = index / (count - 1) if count > 1 else 0.0
        pattern = _layer_pattern(text, start + index, origin + index)
        rules.append(Rule((gradient(points, depth),), pattern))
    outside = "" if text is None else f".*{re.escape(text)}"
    return [*rules, Rule((points[0],), rf"^(?!.*{LAYER}\d+\.){outside}")]


def _layer_pattern(text: str | None, here: int, there: int) -> str:
    """The tensors of layer `here` of the output that are called *text* in layer `there` of their source."""
    layer, prefix = rf"{LAYER}{here}\.", f"model.layers.{there}."
    if text is None or text in prefix:
        return layer
    ends = [text[cut:] for cut in range(1, len(text)) if prefix.endswith(text[:cut])]
    within = [f".*{re.escape(text)}", *map(re.escape, ends)]
    return f"{layer}(?:{'|'.join(within)})"
