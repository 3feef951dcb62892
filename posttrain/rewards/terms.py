"""The reward of the RL stage: a reward model or a function, less the penalties for length and truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemma2.merging.errors import InputError, UsageError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.schemas import RewardFields

from .functions import Sampled, Score, function_score
from .model import RewardModel, shaped_rewards

__all__ = ["reward_score"]


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
