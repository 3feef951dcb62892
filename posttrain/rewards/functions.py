"""Python functions as rewards: `module:function`, called as TRL calls its reward functions.

A function gets keyword lists: `prompts` (messages), `completions` (texts), every column of the prompt rows, and
`truncated`. It returns one value per completion, or one mapping of named values.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2.merging.errors import InputError, UsageError
from gemma2.posttrain.data.rows import Prompt

__all__ = ["Sampled", "Score", "function_score", "load_function"]


@dataclass(frozen=True)
class Sampled:
    """Completions as a score sees them; one entry per completion, prompt-major."""

    rows: Sequence[Prompt]
    prompts: Sequence[Sequence[int]]  # token ids
    completions: Sequence[Sequence[int]]  # token ids, with the stop token where one was drawn
    texts: Sequence[str]
    truncated: Sequence[bool]


Score = Callable[[Sampled], Mapping[str, Sequence[float]]]


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises UsageError, naming the option, when there is none."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"{option} {name!r} is not module:function", "write for instance my_rewards:brevity")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UsageError(
            f"{option} {name!r}: {error}", "check the name, and that the module is on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UsageError(f"{option} {name!r}: {module_name} has no {attribute!r}", "check the name") from error
    if not callable(function):
        raise UsageError(f"{option} {name!r} is not a function", "name a function")
    return function


def function_score(name: str, option: str, column: str) -> Score:
    """A score from `module:function`. Plain values go to `column`; mappings give one column per key."""
    function = load_function(name, option)

    def score(sampled: Sampled) -> dict[str, list[float]]:
        extra = {key: [row.extra.get(key) for row in sampled.rows] for key in sampled.rows[0].extra}
        inputs = {**extra, "truncated": list(sampled.truncated)}
        try:
            values = list(
                function(prompts=[row.messages for row in sampled.rows], completions=list(sampled.texts), **inputs)
            )
        except Exception as error:  # the user's code: any exception is theirs to mend, not a bug of ours
            detail = f"{type(error).__name__}: {error}"
            raise InputError(f"{option} {name!r} failed with {detail}", "mend the function") from error
        if len(values) != len(sampled.texts):
            raise InputError(
                f"{option} {name!r} returned {len(values)} values for {len(sampled.texts)} completions",
                "return one value per completion",
            )
        return _columns(values, f"{option} {name!r}", column)

    return score


def _columns(values: Sequence[Any], source: str, column: str) -> dict[str, list[float]]:
    mappings = [value if isinstance(value, Mapping) else {column: value} for value in values]
    if any(mapping.keys() != mappings[0].keys() for mapping in mappings):
        raise InputError(f"{source} returned different keys for different completions", "return the same keys always")
    columns = {}
    for key in mappings[0]:
        try:
            columns[str(key)] = [float(mapping[key]) for mapping in mappings]
        except (TypeError, ValueError) as error:
            raise InputError(f"{source} returned something that is no number for {key!r}", "return numbers") from error
        if not all(math.isfinite(value) for value in columns[str(key)]):
            raise InputError(f"{source} returned NaN or infinity for {key!r}", "return finite numbers")
    return columns
