"""Python functions as rewards: `module:function`, called with keyword lists as TRL calls its reward functions.

    prompts          messages                           prompt_ids       their token ids, chat format included
    completions      texts                              completion_ids   token ids, the stop token included
    truncated        True if the limit came first       and every other column of the prompt rows, None if it is missing

The function returns one number per completion, or one mapping of named numbers. None: it has no opinion on a sample.

Deviations from TRL 1.16 (RLOOTrainer._calculate_rewards):
1. Completions are texts, also for conversational prompts (TRL: lists with one message).
2. `prompt_ids` and `truncated` are added; `trainer_state`, `log_extra` and `log_metric` are missing (a mapping reports
   further numbers).
3. Async functions are refused.
4. NaN is an error, not the same as None.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat, cast

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.core.yaml_files import closest
from gemma2.posttrain.data.rows import Prompt

from .call_limit import limited

__all__ = ["Sampled", "Score", "function_score", "load_function"]


@dataclass(frozen=True)
class Sampled:
    """Completions as the input of a score; one entry per completion, prompt-major."""

    rows: Sequence[Prompt]
    prompts: Sequence[Sequence[int]]  # token ids
    completions: Sequence[Sequence[int]]  # token ids, including the stop token if one was drawn
    texts: Sequence[str]
    truncated: Sequence[bool]


Score = Callable[[Sampled], Mapping[str, Sequence[float]]]  # named columns; NaN where a column does not apply
# A user's function: per completion a number, None, or a mapping of them; its values are checked when they are read.
RewardFunction = Callable[..., Iterable[object]]


def load_function(name: str, option: str) -> RewardFunction:
    """Import the function `module:function`.

    Raises UsageError, naming the option, if it does not exist, is not a function or is async.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"{option} {name!r} is not module:function", "write for example my_rewards:brevity")
    if module_name.endswith(".py"):
        written = module_name.removesuffix(".py").replace("/", ".")
        raise UsageError(f"{option} {name!r} names a file, not a module", f"write {written}:{attribute}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"{option} {name!r}: {error}", "check the name, and that the module is on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # the user's code: an error of theirs, not a bug of the suite
        raise InputError(
            f"{option} {name!r}: importing {module_name} failed with {_detail(error)}{_line_of(error)}",
            "fix the module",
        ) from error
    try:
        function = getattr(module, attribute)
    except AttributeError as error:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = closest(attribute, functions) if functions else "define it there, or name another module"
        raise UsageError(f"{option} {name!r}: {module_name} has no {attribute!r}", hint) from error
    if not callable(function):
        raise UsageError(f"{option} {name!r} is not a function", "name a function")
    if _is_async(function):
        raise UsageError(f"{option} {name!r} is async", "name a plain function that calls asyncio.run")
    return cast(RewardFunction, function)


def _detail(error: BaseException) -> str:
    """What user code raised. SystemExit too: it would end the command with a code that says nothing, or 0."""
    called = f"a call of sys.exit({error.code!r})" if isinstance(error, SystemExit) else ""
    return called or " ".join(f"{type(error).__name__}: {error}".split())


def _line_of(error: BaseException) -> str:
    """The place of the user's line that raised, as far as it is known."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "" if isinstance(error, SyntaxError) else f" ({last.filename}:{last.lineno})"


def _is_async(function: Callable[..., object]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def function_score(name: str, option: str, column: str, abstains: bool = False, seconds: float | None = None) -> Score:
    """Return a score from `module:function`. Plain values go to `column`; mappings give one column per key.

    With `abstains` None becomes NaN, else it is refused like every value that is not a finite number. A call that takes
    longer than `seconds` is a GuardStop.
    """
    function = load_function(name, option)
    source = f"{option} {name!r}"

    def score(sampled: Sampled) -> dict[str, list[float]]:
        if not sampled.completions:  # a process without a row: sharded reward models run with the others' anyway
            return {column: []}
        try:
            values = limited(lambda: list(function(**_arguments(sampled))), seconds, source)
        except GuardStop:
            raise
        except (Exception, SystemExit) as error:  # the user's code: an error of theirs, not a bug of the suite
            detail = _detail(error)
            unexpected = isinstance(error, TypeError) and "unexpected keyword argument" in detail
            hint = "let it accept **kwargs, like TRL's reward functions" if unexpected else "fix the function"
            raise InputError(f"{source} failed with {detail}", hint) from error
        if len(values) != len(sampled.texts):
            raise InputError(
                f"{source} returned {len(values)} values for {len(sampled.texts)} completions",
                "return one value per completion",
            )
        return _columns(values, source, column, abstains)

    return score


def _arguments(sampled: Sampled) -> dict[str, Sequence[object]]:
    """Return the keyword arguments of a function. A column of the rows never replaces an argument of the same name."""
    names = dict.fromkeys(name for row in sampled.rows for name in row.extra)
    return {
        **{name: [row.extra.get(name) for row in sampled.rows] for name in names},
        "prompts": [row.messages for row in sampled.rows],
        "completions": list(sampled.texts),
        "prompt_ids": [list(ids) for ids in sampled.prompts],
        "completion_ids": [list(ids) for ids in sampled.completions],
        "truncated": list(sampled.truncated),
    }


def _columns(values: Sequence[object], source: str, column: str, abstains: bool) -> dict[str, list[float]]:
    keys: Mapping[object, object] = next((value for value in values if isinstance(value, Mapping)), {column: None})
    silent: Mapping[object, object] = (
        dict.fromkeys(keys) if abstains else {column: None}
    )  # None among mappings: no opinion on any key
    mappings: list[Mapping[object, object]] = [
        value if isinstance(value, Mapping) else silent if value is None else {column: value} for value in values
    ]
    if any(mapping.keys() != mappings[0].keys() for mapping in mappings):
        raise InputError(f"{source} returned different keys for different completions", "always return the same keys")
    return {str(key): [_number(mapping[key], source, key, abstains) for mapping in mappings] for key in mappings[0]}


def _number(value: object, source: str, key: object, abstains: bool) -> float:
    if value is None and abstains:
        return math.nan
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(cast(SupportsFloat, value))  # anything else raises
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{source} returned a value that is not a number for {key!r}: {value!r:.40}", "return numbers"
        ) from error
    if not math.isfinite(number):
        raise InputError(f"{source} returned NaN or infinity for {key!r}", "return finite numbers")
    return number
