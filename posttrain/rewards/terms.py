"""The reward of a completion: reward models and functions, weighted, summed, clipped, less the penalties.

    r = clip(sum_k w_k r_k, -C, C) - length_penalty * tokens - missing_eos_penalty * [truncated]

The columns of a score, one value per completion:

    reward                the value that RL maximises and evaluations plot
    rewards/NAME          r_k before its weight, if there are several terms; NAME as in TRL: the directory of a reward
                          model, the name of a function, `ensemble`; repeated names get `-2`, `-3` ...
    reward_disagreement   standard deviation of the members' scores (divided by M), if an ensemble uses their mean or
                          smallest
    further names         further values that a function returned

NaN means that a term has no opinion (a function returned None): it adds nothing to the sum, and the mean of its column
is over the rest. TRL 1.16 does the same (RLOOTrainer._calculate_rewards).

Deviation: a completion on which no term has an opinion is an error. TRL leaves it out of the baseline and gives it no
advantage; here every sample of a group counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor

from gemma2.core.errors import GuardStop, InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.runs.inputs import check_reward_terms, model_name
from gemma2.posttrain.schemas import RewardFields
from gemma2.posttrain.sharding.divided_models import lent_reward_model
from gemma2.posttrain.sharding.units import ShardLayout

from .functions import Sampled, Score, function_score
from .model import RewardModel, shaped_rewards
from .warm import averaged_reward_model

__all__ = ["column_means", "reward_score", "weighted_sum"]

REWARD = "reward"
DISAGREEMENT = "reward_disagreement"
# Figures of a training step or an evaluation, which a function must not overwrite.
RESERVED = frozenset(
    [
        "step",
        "kind",
        "epoch",
        "loss",
        "learning_rate",
        "gradient_norm",
        "entropy",
        "kl",
        "kl_anchor",
        "length",
        "truncated",
        "distinct_2",
        "reward_std",
        "reward_std_in_group",
        "reward_length_correlation",
        "vllm_mismatch",
    ]
)


@dataclass(frozen=True)
class Term:
    """One term of the reward: `score` returns its values as `reward`, and further columns."""

    name: str
    weight: float
    score: Score


def reward_score(config: RewardFields, chat: ChatFormat, batch_size: int, layout: ShardLayout | None = None) -> Score:
    """Return the reward of a configuration, with a column for each term if there are several.

    `batch_size`: sequences that a reward model reads at once. `layout`: the processes that reward models are divided
    over; each of them then calls the score as often as the others, if need be without a completion. Raises UsageError
    if no term is given or a function does not exist, InputError for an unusable reward model.
    """
    check_reward_terms(config)
    terms = _terms(config, chat, batch_size, layout)
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64)

    def score(sampled: Sampled) -> dict[str, Sequence[float]]:
        values, columns = _evaluated(terms, sampled)
        total = weighted_sum(values, weights, config.reward_clip)
        _check_applies(total, sampled)
        shaped = shaped_rewards(
            total.float(),
            torch.tensor([float(len(ids)) for ids in sampled.completions]),
            torch.tensor([float(cut) for cut in sampled.truncated]),
            config.length_penalty,
            config.missing_eos_penalty,
        )
        return {REWARD: shaped.tolist(), **columns}

    return score


def weighted_sum(values: Tensor, weights: Tensor, clip: float | None = None) -> Tensor:
    """Return sum_k weights[k] * values[k], clipped to [-clip, clip], (N,).

    values: (K, N), NaN where a term has no opinion. weights: (K,). NaN where no term with a weight has an opinion.
    """
    total = (values * weights[:, None]).nansum(0)
    total[values[weights != 0].isnan().all(0)] = math.nan
    return total if clip is None else total.clamp(-clip, clip)


def column_means(columns: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Return the mean of every column over the completions to which it applies, None
    without any."""
    found = {name: [value for value in column if not math.isnan(value)] for name, column in columns.items()}
    return {name: math.fsum(values) / len(values) if values else None for name, values in found.items()}


def _terms(config: RewardFields, chat: ChatFormat, batch_size: int, layout: ShardLayout | None) -> list[Term]:
    """Load functions, then models: a misspelt function fails early. The terms are in the order of the weights."""
    functions = [
        function_score(name, "--reward-fn", REWARD, abstains=True, seconds=config.reward_timeout)
        for name in config.reward_fn
    ]
    scores = [*_model_scores(config, chat, batch_size, layout), *functions]
    models = ["ensemble"] if config.reward_ensemble else [model_name(path) for path in config.reward]
    names = _distinct([*models, *(name.partition(":")[2] for name in config.reward_fn)])
    weights = config.reward_weights or (1.0,) * len(scores)
    return [Term(*parts) for parts in zip(names, weights, scores, strict=True)]


def _model_scores(config: RewardFields, chat: ChatFormat, batch_size: int, layout: ShardLayout | None) -> list[Score]:
    dtype, kernel = frozen_dtype(config.dtype), config.attention
    if config.reward_ensemble == "warm":
        average = averaged_reward_model(config.reward, dtype, kernel, layout)
        return [_model_score(average, "the average", chat, batch_size)]
    members = []
    for path in config.reward:
        if layout is None:
            model = RewardModel.from_dir(path, dtype, kernel)
        else:
            model = RewardModel(*lent_reward_model(path, layout, dtype, kernel))
        members.append(_model_score(model, str(path), chat, batch_size))
    return [_ensemble_score(members, config.reward_ensemble)] if config.reward_ensemble else members


def _model_score(model: RewardModel, name: str, chat: ChatFormat, batch_size: int) -> Score:
    same_ids = model.reads(chat.tokenizer)

    def score(sampled: Sampled) -> dict[str, list[float]]:
        if same_ids:
            rewards = model.score(sampled.prompts, sampled.completions, batch_size)
        else:
            conversations = [row.messages for row in sampled.rows]
            rewards = model.score_text(conversations, sampled.texts, sampled.truncated, batch_size)
        if not rewards.isfinite().all():
            raise GuardStop(f"the reward of --reward {name} is NaN or infinite", "check the reward model")
        return {REWARD: rewards.tolist()}

    return score


def _ensemble_score(members: Sequence[Score], how: str) -> Score:
    """Return a score: mean or smallest of the members' scores, and their standard deviation."""

    def score(sampled: Sampled) -> dict[str, list[float]]:
        scores = torch.tensor([member(sampled)[REWARD] for member in members], dtype=torch.float64)  # (M, N)
        combined = scores.mean(0) if how == "mean" else scores.amin(0)
        return {REWARD: combined.tolist(), DISAGREEMENT: scores.std(0, correction=0).tolist()}

    return score


def _evaluated(terms: Sequence[Term], sampled: Sampled) -> tuple[Tensor, dict[str, Sequence[float]]]:
    """Return the values (K, N) fp64 of the terms, and every column except the reward."""
    values: list[Sequence[float]] = []
    columns: dict[str, Sequence[float]] = {}
    for term in terms:
        found = dict(term.score(sampled))
        if REWARD not in found:
            given = ", ".join(found) or "nothing"
            raise InputError(f"--reward-fn {term.name} returned {given} but no 'reward'", "return plain numbers")
        values.append(found.pop(REWARD))
        if len(terms) > 1:
            found = {f"rewards/{term.name}": values[-1], **found}
        for name in found.keys() & RESERVED:
            raise InputError(f"the reward's {term.name} returned {name!r}, a figure of the run", "rename the key")
        for name in found.keys() & columns.keys():
            raise InputError(f"two terms of the reward return {name!r}", "rename the key in one of the functions")
        columns |= found
    return torch.tensor(values, dtype=torch.float64), columns


def _check_applies(total: Tensor, sampled: Sampled) -> None:
    missing = total.isnan().nonzero().flatten().tolist()
    if missing:
        raise InputError(
            f"no term of the reward has an opinion on {len(missing)} of {len(total)} completions, "
            f"the first for the prompt {sampled.rows[missing[0]].where or sampled.rows[missing[0]].messages}",
            "let one of the functions return a number for it",
        )


def _distinct(names: Iterable[str]) -> list[str]:
    """Return the names, repeated ones with a number: rm, rm-2, rm-3."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in count(2))
        found.append(next(each for each in chain([name], numbered) if each not in found))
    return found
