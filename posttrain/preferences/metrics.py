"""How well rewards order preference pairs: accuracy, loss, margin, calibration, and what length has to do with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["preference_metrics"]

BINS = 10  # of the calibration error, over confidences from 1/2 to 1


def preference_metrics(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> dict[str, float | None]:
    """How well rewards order pairs. chosen, rejected: (N,); lengths: (2N,) tokens of the completions, chosen first.

    accuracy: share of pairs in the right order, ties count half; accuracy_error: its standard error.
    loss: mean Bradley-Terry loss, nats. margin: mean of chosen - rejected.
    calibration_error: mean |accuracy - confidence| over bins of the confidence sigmoid(|margin|), weighted by pairs.
    reward_length_correlation: Pearson, over all completions; None where rewards or lengths do not vary.
    """
    margins = (chosen - rejected).double()
    correct = (margins > 0).double() + 0.5 * (margins == 0).double()
    rewards = torch.cat([chosen, rejected]).double()
    accuracy = correct.mean().item()
    return {
        "accuracy": accuracy,
        "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / len(margins)),
        "loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "margin": margins.mean().item(),
        "calibration_error": _calibration_error(margins.abs().sigmoid(), correct),
        "reward_length_correlation": _correlation(rewards, lengths.double()),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
    }


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """confidence (N,) in [1/2, 1], correct (N,) in {0, 1/2, 1}."""
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp_(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item()


def _correlation(a: Tensor, b: Tensor) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else None
