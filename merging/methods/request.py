"""A merge as the user asks for it, and the plain numbers that it comes down to for one tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.safetensors_header import printable

from .option import OPTIONS, OptionValue
from .parameters import Number, Schedule, value_at

__all__ = [
    "DTYPES",
    "FILES",
    "Granularity",
    "MergeRequest",
    "Settings",
    "Slice",
    "TokenSource",
    "VocabularyChoice",
    "file_named",
    "is_input",
    "settings_at",
]

Granularity = Literal["layer", "tensor", "model"]

# Fields that choose files of the output: those of an input, or a file.
FILES = ("chat_template", "generation_config", "special_tokens")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def default_threads() -> int:
    """One more than there are cores, since one waits for the disk; at most 9."""
    return min(os.cpu_count() or 1, 8) + 1


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A run of layers of the output, stacked after those of the slices before it.

    layers   per model of the slice: (index into the request's models, first layer, end layer), all of one length
    base     the layers of the base that they are compared with; those of the first model when None
    changes  fields of the request that differ in this slice; per-model fields follow the slice's models
    """

    layers: tuple[tuple[int, int, int], ...]
    base: tuple[int, int] | None = None
    changes: JsonMapping = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSource:
    """The row of one token of the output.

    model  whose row it is; None is a row of zeros
    force  for all models, also those that have the token; else for those that lack it
    other  the token of that model whose row it is, `index` the number of the row; the token itself when both are None
    """

    token: str
    model: str | None
    force: bool = False
    other: str | None = None
    index: int | None = None


@dataclass(frozen=True)
class VocabularyChoice:
    """Rows of the vocabulary that are not those that follow from the tokenizers.

    tokens    rows of single tokens
    multiple  the number of rows is rounded up to a multiple of it, with rows of zeros
    """

    tokens: tuple[TokenSource, ...] = ()
    multiple: int | None = None


def _named(values: Mapping[str, OptionValue], attribute: str) -> OptionValue:
    """The value of an option by its attribute, given or initial."""
    for option in OPTIONS.values():
        if option.attribute == attribute:
            return values.get(attribute, option.initial)
    raise AttributeError(f"no merge option is called {attribute}")


@dataclass(frozen=True, kw_only=True, init=False)
class MergeRequest:
    """One merge as the user asks for it.

    Every option of the method (`merging/methods/option.py`) is a keyword and an attribute as well: `t`, `etas`,
    `weights`, ... A number is a float, or a Schedule over tensors; one per model or output is a tuple.

    method       a name in METHODS
    models       directories of models or adapters, MODEL+ADAPTER, or hub ids; their order counts for slerp and warp of
                 three or more, and for ema
    base         the init that task vectors start from, or that the result is interpolated to (liti)
    granularity  the tensors that share coefficients or a threshold: those of a transformer layer, a tensor alone, or
                 the whole model; None is the method's own
    slices       layers of the output taken from layers of the models; () is all layers one to one
    tokenizer    whose tokenizer and vocabulary the output has: "base", "union", a model's path; None needs equal ones
    allow_config  keys of config.json that may differ; the output has the first model's values
    vocabulary   rows of single tokens and padding of the vocabulary, with a tokenizer
    chat_template  of the output: "auto", a name, Jinja text, the number of a model from 1, "base", or a file; None is
                 that of the tokenizer that the output has
    generation_config  of the output: the number of a model from 1, "base", or a file; None is that of the first model
    special_tokens  of the output, likewise; None is those of the tokenizer that the output has
    recorded     of a recipe: role and identity of each input, as a manifest records parents; others are refused
    dtype        of the output: bfloat16, float16 or float32; that of the first model when None
    threads      that read, compute and write side by side; None is one more than cores, at most 9
    stream       merge models of the hub while they arrive; does not change the result
    values       the options whose value is not the initial one, by attribute
    """

    method: str
    models: tuple[Path, ...]
    base: Path | None
    granularity: Granularity | None
    slices: tuple[Slice, ...]
    tokenizer: str | None
    allow_config: tuple[str, ...]
    recorded: tuple[JsonMapping, ...]
    vocabulary: VocabularyChoice | None
    chat_template: str | None
    generation_config: str | None
    special_tokens: str | None
    dtype: str | None
    threads: int
    stream: bool
    values: Mapping[str, OptionValue]

    def __init__(
        self,
        *,
        method: str,
        models: tuple[Path, ...],
        base: Path | None = None,
        granularity: Granularity | None = None,
        slices: tuple[Slice, ...] = (),
        tokenizer: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        **options: Any,  # an OptionValue each; the fields popped below; `values` from replace  # noqa: ANN401
    ) -> None:
        allowed: tuple[str, ...] = options.pop("allow_config", ())
        recorded: tuple[JsonMapping, ...] = options.pop("recorded", ())
        stream: bool = options.pop("stream", False)
        vocabulary = options.pop("vocabulary", None)
        files: dict[str, str | None] = {name: options.pop(name, None) for name in FILES}
        given = {**options.pop("values", {}), **options}
        initial = {option.attribute: option.initial for option in OPTIONS.values()}
        unknown = given.keys() - initial.keys()
        if unknown:
            raise TypeError(f"MergeRequest has no option {', '.join(sorted(unknown))}")
        fields = {
            "method": method,
            "models": models,
            "base": base,
            "granularity": granularity,
            "slices": slices,
            "tokenizer": tokenizer,
            "allow_config": tuple(allowed),
            "recorded": tuple(recorded),
            "vocabulary": vocabulary,
            **files,
            "dtype": dtype,
            "threads": default_threads() if threads is None else threads,
            "stream": stream,
            "values": {name: value for name, value in given.items() if value not in (None, (), initial[name])},
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """The value of an option, given or initial; its type is the option's kind."""
        if name.startswith("_") or name == "values":
            raise AttributeError(name)
        return _named(self.values, name)

    def options(self) -> JsonObject:
        """The options as they are recorded in the manifest, without the paths."""
        own = {option.attribute: getattr(self, option.attribute) for option in OPTIONS.values() if option.recorded}
        kept = ("granularity", "tokenizer", "allow_config", *FILES, "dtype")
        common = {name: getattr(self, name) for name in kept}
        values = {"method": self.method, **own, **common}
        given = {name: value for name, value in values.items() if value is not None and value != ()}
        parts = {"slices": [_plain(vars(part)) for part in self.slices]} if self.slices else {}
        rows = {"vocabulary": asdict(self.vocabulary)} if self.vocabulary else {}
        return {name: _plain(value) for name, value in given.items()} | parts | rows


def is_input(choice: str) -> bool:
    """Whether one of FILES names the base, or a model by its number."""
    return choice == "base" or choice.isdecimal()


def file_named(choice: str) -> Path | None:
    """The file that one of FILES names; None for the number of a model, a name, or Jinja text."""
    plain = is_input(choice) or "{" in choice
    return None if plain or not Path(choice).is_file() else Path(choice)


def _plain(value: object) -> object:
    """A value as JSON has it: schedules as their rules."""
    if isinstance(value, Schedule):
        rules = [{"points": list(rule.points), "pattern": rule.pattern} for rule in value.rules]
        return {"rules": rules, "default": value.default}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Settings:
    """The numbers of a request for one tensor: an attribute for each option. Per-model options have one per model."""

    values: tuple[tuple[str, OptionValue], ...]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """The number, the tuple of numbers or the switch of an option, given or initial."""
        if name.startswith("_") or name == "values":
            raise AttributeError(name)
        return _named(dict(self.values), name)


def settings_at(request: MergeRequest, name: str, depth: float) -> Settings:
    """The request's numbers for one tensor at its depth in [0, 1]. Raises UsageError where no rule gives a value."""
    values: list[tuple[str, OptionValue]] = []
    for option in OPTIONS.values():
        value = getattr(request, option.attribute)
        if isinstance(value, tuple):
            value = tuple(_at(number, option.name, name, depth) for number in value)
            if option.per == "model" and len(value) == 1:
                value *= len(request.models)
        elif isinstance(value, Schedule):
            value = _at(value, option.name, name, depth)
        values.append((option.attribute, value))
    return Settings(tuple(values))


def _at(number: Number, parameter: str, name: str, depth: float) -> float:
    value = value_at(number, name, depth)
    if value is None:
        raise UsageError(
            f"no rule of {parameter} fits the tensor {printable(name)}", "add a value without a filter as the last one"
        )
    return value
