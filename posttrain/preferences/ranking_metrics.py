"""How well rewards order preference pairs: accuracy, loss, margin, calibration, and the influence of length.

accuracy        share of pairs with r_c > r_r; a tie counts half
accuracy_error  its standard error. Pairs of one prompt are not independent, so it sums over prompts g:
                sqrt(sum_g (sum_{i in g} (correct_i - accuracy))^2) / N      = sqrt(a (1 - a) / N) with one pair each
loss            mean of -log sigmoid(r_c - r_r), nats: 0.693 for a random order
margin          mean of r_c - r_r
calibration_error   sum over bins of n_b / N |accuracy_b - confidence_b|, confidence = sigmoid(|r_c - r_r|), ten bins
                of equal width from 1/2 to 1 (expected calibration error, Guo et al. 1706.04599, eq. 3)
reward_length_correlation   Pearson's, over all completions, tokens
longer_chosen   share of pairs whose longer answer is the chosen one; this and the next three figures leave out pairs of
                equal length
longer_wins     share of pairs whose longer answer gets the higher reward: above longer_chosen, length is overrated
accuracy_chosen_longer, accuracy_chosen_shorter     accuracy on the pairs whose chosen answer is longer, or shorter
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.models.scorer import correlation

__all__ = ["preference_metrics", "reliability"]

BINS = 10  # of the calibration error, over confidences from 1/2 to 1


def preference_metrics(
    rewards: Tensor, lengths: Sequence[Sequence[int]], prompts: Sequence[Hashable]
) -> dict[str, float | None]:
    """Return the figures above from rewards (2, N), chosen first, and the tokens (2, N) of the completions.

    prompts: (N,), equal for pairs of one prompt. A figure is None if no pair contributes to it.
    """
    rewards = rewards.double()
    margins = rewards[0] - rewards[1]
    correct = _correct(margins)
    tokens = torch.tensor(lengths, dtype=torch.float64)
    return {
        "accuracy": correct.mean().item(),
        "accuracy_error": clustered_error(correct, prompts),
        "loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "margin": margins.mean().item(),
        "calibration_error": _calibration_error(margins.abs().sigmoid(), correct),
        "reward_length_correlation": correlation(rewards.flatten(), tokens.flatten()),
        **_length_bias(correct, tokens),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
    }


def reliability(rewards: Tensor) -> list[JsonObject]:
    """Return a row for each non-empty bin of the confidence: bounds, pairs, mean confidence, accuracy."""
    margins = (rewards[0] - rewards[1]).double()
    confidence, correct = margins.abs().sigmoid(), _correct(margins)
    bins = _bins(confidence)
    return [
        {
            "confidence": f"{0.5 + b / 2 / BINS:.2f}-{0.5 + (b + 1) / 2 / BINS:.2f}",
            "pairs": int((bins == b).sum()),
            "mean_confidence": confidence[bins == b].mean().item(),
            "accuracy": correct[bins == b].mean().item(),
        }
        for b in bins.unique().tolist()
    ]


def clustered_error(values: Tensor, groups: Sequence[Hashable]) -> float:
    """Return the standard error of the mean of values (N,) that are independent between groups, not within."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = torch.zeros(len(number), dtype=torch.float64)
    sums.index_add_(0, torch.tensor([number[group] for group in groups]), values - values.mean())
    return float(sums.norm() / len(values))


def _correct(margins: Tensor) -> Tensor:
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def _bins(confidence: Tensor) -> Tensor:
    return ((confidence - 0.5) * 2 * BINS).long().clamp_(max=BINS - 1)


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the error from confidence (N,) in [1/2, 1] and correct (N,) in {0, 1/2, 1}."""
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, _bins(confidence), correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item()


def _length_bias(correct: Tensor, tokens: Tensor) -> dict[str, float | None]:
    longer, shorter = tokens[0] > tokens[1], tokens[0] < tokens[1]
    differ = longer | shorter
    wins = torch.where(longer, correct, 1 - correct)
    return {
        "longer_chosen": _mean(longer[differ].double()),
        "longer_wins": _mean(wins[differ]),
        "accuracy_chosen_longer": _mean(correct[longer]),
        "accuracy_chosen_shorter": _mean(correct[shorter]),
    }


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
