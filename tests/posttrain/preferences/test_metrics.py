"""Figures of preference pairs by hand: accuracy and its error, loss, calibration, length."""

from __future__ import annotations

import math

import pytest
import torch

from gemma2.posttrain.preferences.ranking_metrics import preference_metrics, reliability


def figures(chosen, rejected, lengths=None, prompts=None):
    """Metrics of rewards given as lists; by default all answers are as long, and every pair has its own prompt."""
    n = len(chosen)
    rewards = torch.stack([torch.as_tensor(side, dtype=torch.float64) for side in (chosen, rejected)])
    return preference_metrics(rewards, lengths or [[1] * n, [1] * n], prompts or range(n))


def test_accuracy_margin_and_loss():
    found = figures([2.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, -3.0])
    # margins 2, -1, 0, 3: two right, one wrong, one tie that counts half
    assert found["accuracy"] == 2.5 / 4 and found["margin"] == 1.0
    expected = [math.log1p(math.exp(-m)) for m in (2, -1, 0, 3)]
    assert found["loss"] == pytest.approx(sum(expected) / 4)
    assert found["reward_mean"] == 0.25


def test_the_error_of_independent_pairs_is_the_binomial_one():
    found = figures([1.0] * 6 + [0.0] * 2, [0.0] * 6 + [1.0] * 2)
    assert found["accuracy_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 8))


def test_pairs_of_one_prompt_count_as_one_observation():
    right = [1.0, 1.0, 1.0, 0.0]
    once, thrice = figures(right, [0.5] * 4), figures(right * 3, [0.5] * 12, prompts=[0, 1, 2, 3] * 3)
    assert thrice["accuracy_error"] == pytest.approx(once["accuracy_error"])
    # Two prompts of two pairs: deviations 1/4 + 1/4 and 1/4 - 3/4, so sqrt(1/4 + 1/4) / 4.
    grouped = figures(right, [0.5] * 4, prompts=["a", "a", "b", "b"])
    assert grouped["accuracy_error"] == pytest.approx(math.sqrt(0.5) / 4)


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    # Four pairs at confidence 0.9 of which three are right, one at 0.6 that is wrong: bins 0.9-0.95 and 0.6-0.65.
    sure, unsure = math.log(0.9 / 0.1) + 1e-9, math.log(0.6 / 0.4) + 1e-9
    margins = [sure, sure, sure, -sure, -unsure]
    expected = (4 * abs(0.75 - 0.9) + 1 * abs(0 - 0.6)) / 5
    assert figures(margins, [0.0] * 5)["calibration_error"] == pytest.approx(expected)
    low, high = reliability(torch.tensor([margins, [0.0] * 5], dtype=torch.float64))
    assert (low["confidence"], low["pairs"], low["accuracy"]) == ("0.60-0.65", 1, 0.0)
    assert (high["confidence"], high["pairs"], high["accuracy"]) == ("0.90-0.95", 4, 0.75)
    assert high["mean_confidence"] == pytest.approx(0.9)


def test_pairs_at_their_stated_confidence_are_calibrated():
    draw = torch.Generator().manual_seed(0)
    margins = torch.randn(20000, generator=draw, dtype=torch.float64) * 2
    right = torch.rand(20000, generator=draw, dtype=torch.float64) < margins.abs().sigmoid()
    signed = torch.where(right, margins.abs(), -margins.abs())
    assert figures(signed, torch.zeros_like(signed))["calibration_error"] < 0.015


def test_reward_length_correlation():
    assert figures([1.0, 2.0], [3.0, 5.0], [[10, 20], [30, 50]])["reward_length_correlation"] == pytest.approx(1.0)
    # Rewards 1, 0, 0, 1 and lengths 1, 2, 3, 4 do not correlate.
    assert figures([1.0, 0.0], [0.0, 1.0], [[1, 2], [3, 4]])["reward_length_correlation"] == pytest.approx(0.0)
    assert figures([0.0, 0.0], [0.0, 0.0], [[1, 2], [3, 4]])["reward_length_correlation"] is None


def test_length_bias():
    # lengths (chosen, rejected): longer, longer, shorter, shorter, equal; right, wrong, wrong, tie, right
    lengths = [[5, 5, 1, 1, 2], [1, 1, 5, 5, 2]]
    found = figures([1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0], lengths)
    assert found["longer_chosen"] == 2 / 4
    assert found["longer_wins"] == (1 + 0 + 1 + 0.5) / 4
    assert found["accuracy_chosen_longer"] == 1 / 2 and found["accuracy_chosen_shorter"] == 0.5 / 2
    equal = figures([1.0], [0.0])
    assert equal["longer_wins"] is None and equal["accuracy_chosen_longer"] is None


def test_a_reward_that_is_the_length_always_lets_the_longer_one_win():
    found = figures([5.0, 1.0], [1.0, 5.0], [[5, 1], [1, 5]])
    assert found["longer_wins"] == 1.0 and found["accuracy"] == found["longer_chosen"] == 0.5
