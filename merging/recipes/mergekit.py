"""Files written for mergekit 0.1.5, as requests of ours: what they ask for is done, or refused by the key that asks.

Meanings and defaults are those that its documentation states and that its outputs show (tests/merging/golden). What is
read where, the first that fits: a source of a slice, the slice, a model, the file. A filter is a part of a tensor's
name, "*" is every tensor; in a slice it is a part of the name that the tensor has in its source. A gradient runs over
the layers of a slice; tensors outside the layers take its first point, the final norm and the head that of the last
slice. Parameters that the method does not read have no effect there either: they are named in a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.yaml_files import closest
from gemma2.merging.methods.parameters import Number, Schedule
from gemma2.merging.methods.request import MergeRequest, Slice
from gemma2.merging.methods.table import METHODS as TABLE

from .mergekit_output import read_output
from .mergekit_rules import Rules, complement, everywhere, only_keys, per_layer, read_model, read_rules
from .place import Place, check_name, layer_range, plain_number, shown
from .step import Step, needs_of

__all__ = ["is_mergekit", "mergekit_steps"]

KEYS = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name", "input_model_parameters"),
)
# Files of its other tools, by a key that only they have.
OTHER_TOOLS = {
    "experts": ("mergekit-moe", "mixtures of experts are not built here: merge the experts into one model instead"),
    "genome": ("mergekit-evolve", "search merge weights with gemma2 pipeline run merge-search"),
    "layer_slices": ("mergekit-legacy and bakllama", "write slices: [{sources: [{model: .., layer_range: [..]}]}]"),
}


# Their name -> our method and its form in their terms.
METHODS = {name: (ours, form) for ours, method in TABLE.items() for name, form in method.mergekit.items()}
BY_ROWS = "nuslerp with nuslerp_flatten: false"  # an entry of the table like a method
NAMES = [name for name in METHODS if name != BY_ROWS]
NUMBERS = ("t", "lambda", "select_topk", "epsilon", "r", "alpha")  # options that may differ between tensors
PARAMETERS = {
    name for _, form in METHODS.values() for part in (form.per_model, form.options, form.only) for name in part
}
# It ignores what a method does not read: these stand in published files without effect.
PARAMETERS |= {"int8_mask", "dtype", "out_dtype", "embed_slerp", "allow_negative_weights", "nuslerp_flatten"}
LARGEST_EPS = 1e-6  # that mergekit adds to a length; 1e-4 changed its result by 4e-5 of the task vector


def is_mergekit(document: JsonMapping) -> bool:
    """Whether a document is in mergekit's keys."""
    own = {"merge_method", "base_model", "tokenizer_source", "out_dtype", "modules", *OTHER_TOOLS} & document.keys()
    return bool(own) or ("slices" in document and "method" not in document)


def mergekit_steps(documents: Sequence[JsonMapping], place: Place) -> list[Step]:
    """One step per document; the one without a name, of several, is called "final"."""
    several = len(documents) > 1
    names = [
        check_name(document.get("name", "final"), replace(place, document=number)) if several else ""
        for number, document in enumerate(documents)
    ]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise replace(place, document=number).wrong(
                f"has two merges named '{name}'", "name each by another 'name:'"
            )
    inside = replace(place, names=frozenset(names) - {""})
    return [
        _Document(document, replace(inside, key=name, document=number)).step(name)
        for number, (name, document) in enumerate(zip(names, documents, strict=True))
    ]


@dataclass(frozen=True)
class SourceSpec:
    """A model of a slice, with its layers (None in a file of whole models) and its levels of parameters."""

    path: Path
    layers: tuple[int, int] | None
    parameters: JsonMapping
    place: Place


@dataclass(frozen=True)
class SliceSpec:
    """A slice of the output, or the whole of it, with the first of its layers in the output."""

    sources: tuple[SourceSpec, ...]
    parameters: JsonMapping
    place: Place
    start: int = 0


class _Document:
    """One merge in mergekit's keys."""

    def __init__(self, values: JsonMapping, place: Place) -> None:
        self.place = self.inside = place  # of the file, and of what holds its models or slices
        self.notes: dict[str, None] = {}
        for key in OTHER_TOOLS.keys() & values.keys():
            tool, hint = OTHER_TOOLS[key]
            raise place.at(key).wrong(f"is a key of {tool}, another tool", hint)
        self.values = self._one_module(values)
        for key in self.values:
            if key == "input_model_parameters" or (key not in KEYS and key in PARAMETERS):
                self.notes[f"{key} has no effect at the top of the file: mergekit reads it below parameters"] = None
            elif key not in KEYS:
                raise place.unknown(key, [known for known in KEYS if known != "modules"])  # "modles" means models
        self.output = read_output(self.values, place)
        self.parameters: JsonMapping = {}
        self.name = self._method()
        self.ours, self.method = METHODS[self.name]
        self.parameters = self._parameters(self.values.get("parameters"), place.at("parameters"))
        base, spot = self._base()
        self.base = None if base is None else read_model(base, spot)
        if self.base is None and self.method.base == "required":
            raise place.wrong(f"has no 'base_model' ({self.name} needs one)", "add base_model: DIR")

    def _one_module(self, values: JsonMapping) -> JsonMapping:
        """The document with the keys of its only module at the top."""
        modules = values.get("modules")
        if modules is None:
            return values
        place = self.place.at("modules")
        if not isinstance(modules, dict) or not modules:
            raise place.wrong(f"is {shown(modules)}", "write {default: {slices: [..]}}")
        if len(modules) > 1:
            raise place.wrong(
                f"has {len(modules)} modules ({', '.join(map(str, modules))}), text models have one",
                "keep the one of the text model",
            )
        ((name, module),) = modules.items()
        only_keys(module, ("models", "slices"), place.at(str(name)))
        twice = sorted(module.keys() & values.keys())
        if twice:
            raise self.place.wrong(f"has '{twice[0]}' next to 'modules'", "keep one of them")
        self.inside = place.at(str(name))
        return {**{key: value for key, value in values.items() if key != "modules"}, **module}

    def _base(self) -> tuple[object, Place]:
        """The base_model of the file, or the one that all slices name."""
        base, place = self.values.get("base_model"), self.place.at("base_model")
        slices = self.values.get("slices")
        for index, part in enumerate(slices if isinstance(slices, list) else []):
            own = part.get("base_model") if isinstance(part, dict) else None
            spot = self.inside.at("slices").at(index).at("base_model")
            if own is not None and base not in (None, own):
                raise spot.wrong(f"is {shown(own)}, another base is {shown(base)}", "merge in steps of one base each")
            base, place = (own, spot) if own is not None else (base, place)
        return base, place

    def _method(self) -> str:
        name, place = self.values.get("merge_method"), self.place
        if name is None:
            raise place.wrong("has no 'merge_method'", f"choose one of {', '.join(NAMES)}")
        if name not in NAMES:
            raise place.at("merge_method").wrong(f"is {shown(name)}", closest(str(name), NAMES))
        parameters = self.values.get("parameters")
        flatten = parameters.get("nuslerp_flatten") if isinstance(parameters, dict) else None
        return BY_ROWS if name == "nuslerp" and flatten is False else str(name)

    def step(self, name: str) -> Step:
        """The merge as a request of ours."""
        parts = self._parts()
        base = self.base if self.method.base in ("required", "optional") else None
        if self.name == "slerp":
            parts, base = [self._slerp_order(part) for part in parts], None
        models = tuple(dict.fromkeys(source.path for part in parts for source in part.sources if source.path != base))
        parts = [part for part in parts if part.sources]
        if base is not None and not models:
            return self._of_base(parts, base, name)
        self._check_sources(parts, base)
        common: JsonObject = {"method": self.ours, "models": models, "base": base, "granularity": "tensor"}
        common |= self.output.fields()
        if "slices" in self.values:
            if (
                base is not None
                and any(source.path != base for part in parts for source in part.sources)
                and any(all(source.path == base for source in part.sources) for part in parts)
            ):
                common["models"] = models = (*models, base)  # for the slices that have no other model
            slices = tuple(self._slice(part, models, base) for part in parts)
            request = MergeRequest(**common, slices=slices)
        else:
            request = MergeRequest(**common, **self._settings(parts[0], base))
        return Step(
            name=name,
            request=request,
            needs=needs_of(request, self.place.names),
            notes=tuple(self.notes),
            place=self.place,
        )

    def _of_base(self, parts: Sequence[SliceSpec], base: Path, name: str) -> Step:
        """A merge whose only model is its base: no task vector, so that the base is taken as it is."""
        self.notes[f"the base is the only model of this {self.name}: it is taken as it is"] = None
        slices = tuple(Slice(layers=((0, *layers),)) for part in parts if (layers := part.sources[0].layers))
        tokenizer = None if self.output.tokenizer in ("base", "union") else self.output.tokenizer
        request = MergeRequest(
            method="passthrough", models=(base,), slices=slices, granularity="tensor",
            **{**self.output.fields(), "tokenizer": tokenizer},
        )  # fmt: skip
        return Step(
            name=name, request=request, needs=needs_of(request, self.place.names), notes=tuple(self.notes),
            place=self.place,
        )  # fmt: skip

    # --- models and slices ---

    def _parts(self) -> list[SliceSpec]:
        if ("models" in self.values) == ("slices" in self.values):
            raise self.place.wrong("needs 'models' or 'slices', and not both", "keep one of them")
        if "models" in self.values:
            sources = self._sources(self.values["models"], self.inside.at("models"), sliced=False)
            if self.base is not None and self.base not in [source.path for source in sources]:
                sources = (*sources, SourceSpec(self.base, None, {}, self.place.at("base_model")))
            return [SliceSpec(sources, {}, self.place)]
        place, parts, start = self.inside.at("slices"), [], 0
        for index, value in enumerate(_list(self.values["slices"], place)):
            here = place.at(index)
            only_keys(value, ("sources", "parameters", "base_model"), here)
            sources = self._sources(value.get("sources"), here.at("sources"), sliced=True)
            lengths = {end - first for first, end in (source.layers or (0, 0) for source in sources)}
            if len(lengths) > 1:
                raise here.wrong(f"has sources of {' and '.join(map(str, sorted(lengths)))} layers", "make them equal")
            parameters = self._parameters(value.get("parameters"), here.at("parameters"))
            parts.append(SliceSpec(sources, parameters, here, start))
            start += lengths.pop()
        return parts

    def _sources(self, values: object, place: Place, sliced: bool) -> tuple[SourceSpec, ...]:
        found = []
        for index, value in enumerate(_list(values, place)):
            here = place.at(index)
            only_keys(value, ("model", "layer_range", "parameters") if sliced else ("model", "parameters"), here)
            if "model" not in value:
                raise here.wrong("has no 'model'", "add model: DIR")
            layers = layer_range(value.get("layer_range"), here.at("layer_range")) if sliced else None
            parameters = self._parameters(value.get("parameters"), here.at("parameters"))
            found.append(SourceSpec(read_model(value["model"], here.at("model")), layers, parameters, here))
        return tuple(found)

    def _slerp_order(self, part: SliceSpec) -> SliceSpec:
        """t = 0 is the base model, wherever it is listed."""
        first = [source for source in part.sources if source.path == self.base]
        others = [source for source in part.sources if source.path != self.base]
        if len(first) != 1 or len(others) != 1:
            raise part.place.wrong(
                f"has {len(part.sources)} models, slerp takes two of which one is base_model", "change the models"
            )
        return SliceSpec((first[0], others[0]), part.parameters, part.place, part.start)

    def _check_sources(self, parts: Sequence[SliceSpec], base: Path | None) -> None:
        for part in parts:
            paths = [source.path for source in part.sources]
            if base is not None and base not in paths:
                raise part.place.wrong(f"lacks the base_model {base} among its sources", "add it with its layer_range")
            if self.ours == "passthrough" and len(paths) != 1:
                raise part.place.wrong(f"has {len(paths)} models, passthrough takes one", "use slices")
            for path in paths:
                if paths.count(path) > 1 and (self.name != "linear" or path == base):
                    raise part.place.wrong(f"names {path} twice", "name each model once")

    def _slice(self, part: SliceSpec, models: Sequence[Path], base: Path | None) -> Slice:
        inputs = [source for source in part.sources if source.path != base]
        layers = tuple((models.index(source.path), *(source.layers or (0, 0))) for source in inputs)
        if not inputs and base is not None:
            layers = tuple((models.index(base), *(source.layers or (0, 0))) for source in part.sources)
            numbers = {"weights": (1.0,), "density": (1.0,), "gamma": (0.0,), "epsilon": (0.0,)}
            changes = {ours: numbers[ours] for ours, _ in self.method.per_model.values() if ours in numbers}
            return Slice(layers=layers, base=layers[0][1:], changes={**self._settings(part, base), **changes})
        of_base = next((source.layers for source in part.sources if source.path == base), None)
        return Slice(layers=layers, base=of_base, changes=self._settings(part, base))

    # --- parameters ---

    def _parameters(self, values: object, place: Place) -> JsonMapping:
        """A level of parameters; what the method does not read is noted."""
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise place.wrong(f"is {shown(values)}", "write NAME: VALUE")
        for name in values:
            if name not in PARAMETERS:
                raise place.unknown(name, PARAMETERS)
            if not any(name in part for part in (self.method.per_model, self.method.options, self.method.only)):
                self.notes[f"{place.at(name).key} has no effect on {self.name}"] = None
        return values

    def _settings(self, part: SliceSpec, base: Path | None) -> JsonObject:
        """The fields of the request for one slice, or for the whole."""
        inputs = [source for source in part.sources if source.path != base]
        found: JsonObject = dict(self.method.fixed)
        for name, (ours, default) in self.method.per_model.items():
            numbers = tuple(self._number(name, default, part, source) for source in inputs)
            found[ours] = numbers[0] if ours == "scale" else numbers
        for name, (ours, default) in self.method.options.items():
            found[ours] = (
                self._number(name, default, part, None) if name in NUMBERS else self._single(name, default, part)
            )
        for name, value in self.method.only.items():
            given = self._single(name, value, part)
            if name == "eps" and isinstance(given, float) and 0 <= given <= LARGEST_EPS:
                if given != value:
                    self.notes[f"eps {given:g} has no effect here: nothing is added to a length"] = None
                continue
            if value is not None and given != value:
                raise part.place.wrong(f"sets {name} to {shown(given)}", f"only {name}: {str(value).lower()} is done")
        if "epsilon" in found:  # at density 1 nothing is dropped there, whatever epsilon is
            pairs = zip(found["density"], found["epsilon"], strict=True)
            found["epsilon"] = tuple(0.0 if density == 1.0 else epsilon for density, epsilon in pairs)
        if self.name == "slerp":
            t = found.pop("t")
            found["weights"] = (complement(t), t)
        return found

    def _single(self, name: str, default: object, part: SliceSpec) -> Any:  # noqa: ANN401
        """An option that is one value for all tensors."""
        for level, place in ((part.parameters, part.place), (self.parameters, self.place)):
            if level.get(name) is not None:
                value, spot = level[name], place.at("parameters").at(name)
                if isinstance(value, list) and value and all(item == value[0] for item in value):
                    value = value[0]  # a gradient between equal values
                if isinstance(value, list | dict):
                    raise spot.wrong("differs between tensors", "give one value, or slices with one value each")
                if isinstance(default, bool) and value in (0, 1):
                    return bool(value)
                if isinstance(default, bool):
                    raise spot.wrong(f"is {shown(value)}, not true or false", "give true or false")
                if isinstance(default, float):
                    return plain_number(value, spot)
                if isinstance(default, int) and not isinstance(default, bool):
                    return int(plain_number(value, spot))
                return value
        return default

    def _number(self, name: str, default: float | None, part: SliceSpec, source: SourceSpec | None) -> Number:
        """A parameter of one source, or of the merge (source None), by the levels that may give it."""
        levels = [(source.parameters, source.place)] if source else []
        levels += [(part.parameters, part.place), (self.parameters, self.place)]
        rules: Rules = []
        for level, place in levels:
            if level.get(name) is not None:
                rules += read_rules(level[name], place.at("parameters").at(name))
        whole = next((index for index, (text, _) in enumerate(rules) if text is None), None)
        if whole is None and default is not None:
            rules.append((None, [default]))
        elif whole is None:
            spot = source.place if source else part.place
            raise spot.wrong(f"has no '{name}' for every tensor ({self.name} needs it)", "add it to the parameters")
        else:
            rules = rules[: whole + 1]
        if len(rules) == 1 and len(rules[0][1]) == 1:
            return rules[0][1][0]
        layers = (source or part.sources[0]).layers
        if layers is None:
            return Schedule(tuple(rule for text, points in rules for rule in everywhere(text, points)))
        origin = layers[0] if source else part.start
        return Schedule(
            tuple(rule for text, points in rules for rule in per_layer(text, points, layers, part.start, origin))
        )


def _list(values: object, place: Place) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise place.wrong(f"is {shown(values)}", "give a list")
    return values
