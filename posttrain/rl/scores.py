"""What completions are worth: a reward model on token ids, or a function `module:function`, as named columns.

A function is called as TRL calls its reward functions: `prompts` (messages), `completions` (texts) and every column of
the prompt rows as keyword lists, and `truncated`. It returns one value per completion, or one mapping of named values.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma2.merging.errors import InputError, UsageError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models.scorer import RewardModel, shaped_rewards
from gemma2.posttrain.schemas import RewardFields

__all__ = ["Sampled", "Score", "function_score", "load_function", "reward_score"]


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


def reward_score(config: RewardFields, chat: ChatFormat, batch_size: int) -> Score:
    """`reward` as the RL stage sees it: reward model or function, less the penalties for length and truncation."""
    if (config.reward is None) == (config.reward_fn is None):
        raise UsageError("give --reward DIR or --reward-fn module:function, one of them", "see --help")
    raw = (
        _model_score(RewardModel.from_dir(config.reward), chat, batch_size)
        if config.reward is not None
        else function_score(str(config.reward_fn), "--reward-fn", "reward")
    )

    def score(sampled: Sampled) -> dict[str, Sequence[float]]:
        columns: dict[str, Sequence[float]] = dict(raw(sampled))
        if "reward" not in columns:
            raise InputError(f"--reward-fn {config.reward_fn!r} returned no 'reward'", "return plain numbers")
        shaped = shaped_rewards(
            torch.tensor(columns["reward"]),
            torch.tensor([float(len(ids)) for ids in sampled.completions]),
            torch.tensor([float(cut) for cut in sampled.truncated]),
            config.length_penalty,
            config.missing_eos_penalty,
        )
        return columns | {"reward": shaped.tolist()}

    return score


def _model_score(model: RewardModel, chat: ChatFormat, batch_size: int) -> Score:
    same_ids = model.reads(chat.tokenizer)

    def score(sampled: Sampled) -> dict[str, list[float]]:
        if same_ids:
            rewards = model.score(sampled.prompts, sampled.completions, batch_size)
        else:
            conversations = [row.messages for row in sampled.rows]
            rewards = model.score_text(conversations, sampled.texts, sampled.truncated, batch_size)
        return {"reward": rewards.tolist()}

    return score
