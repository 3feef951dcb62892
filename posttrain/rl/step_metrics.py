"""The figures that a step of RL logs about its completions, over the batches of all processes.

reward, reward_std            mean and standard deviation over all completions, penalties included
reward_std_in_group           mean over prompts of the standard deviation among its n samples: 0 teaches nothing
rewards/NAME, ...             means of the reward's parts (rewards/terms.py)
kl_anchor                     mean of log pi(y | x) - log anchor(y | x), nats per sequence, sampled: noisy, may be < 0
length, truncated             mean tokens, the stop token included; share that was cut at the limit
distinct_2                    distinct token bigrams / all bigrams of the batch (Li et al. 2016, 1510.03055)
reward_length_correlation     Pearson's r of reward and length
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from gemma2.posttrain.models.scorer import correlation
from gemma2.posttrain.rewards.terms import column_means

__all__ = ["ScoredCompletions", "batch_metrics", "joined"]


@dataclass(frozen=True)
class ScoredCompletions:
    """Completions with their rewards and log-ratios, (N,) fp32 each; columns: the reward's parts, a value each."""

    ids: list[list[int]]
    truncated: list[bool]
    rewards: Tensor
    log_ratios: Tensor
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)


def joined(parts: Sequence[ScoredCompletions]) -> ScoredCompletions:
    """The completions of all ranks, in the order in which one process would have drawn them."""
    return ScoredCompletions(
        [ids for part in parts for ids in part.ids],
        [cut for part in parts for cut in part.truncated],
        torch.cat([part.rewards for part in parts]),
        torch.cat([part.log_ratios for part in parts]),
        {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns},
    )


def batch_metrics(scored: ScoredCompletions, anchored: bool, n: int) -> dict[str, float | None]:
    """The figures of a step; an undefined one is None."""
    lengths = torch.tensor([float(len(ids)) for ids in scored.ids])
    rewards = scored.rewards
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "reward_std_in_group": rewards.view(-1, n).std(1).mean().item(),
        **column_means(scored.columns),
        "kl_anchor": scored.log_ratios.mean().item() if anchored else None,
        "length": lengths.mean().item(),
        "truncated": sum(scored.truncated) / len(scored.truncated),
        "distinct_2": distinct_bigrams(scored.ids),
        "reward_length_correlation": correlation(rewards, lengths),
    }


def distinct_bigrams(completions: Sequence[Sequence[int]]) -> float | None:
    """Distinct token bigrams / all bigrams of the batch."""
    bigrams = [pair for ids in completions for pair in pairwise(ids)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None
