"""The cross-entropy of chosen positions: torch's value and gradients, in any chunks, with and without a soft cap."""

from __future__ import annotations

import pytest
import torch

from gemma2.posttrain.models import cross_entropy as module
from gemma2.posttrain.models.cross_entropy import summed_cross_entropy, target_logps, weighted_cross_entropy
from gemma2.posttrain.models.head import plain_head
from gemma2.posttrain.tiny.networks import random_model


class Model:
    """A head (V, d) and a soft cap."""

    def __init__(self, weight, cap):
        self.head = torch.nn.Linear(*reversed(weight.shape), bias=False)
        self.head.weight = torch.nn.Parameter(weight)
        self.config = type("Config", (), {"final_logit_softcapping": cap})

    def get_output_embeddings(self):
        return self.head


def direct(model, hidden, targets, scale):
    """All logits at once, by autograd."""
    logits = hidden @ model.head.weight.T
    cap = model.config.final_logit_softcapping
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return scale * torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def in_chunks(monkeypatch, logits):
    """At most so many logits at once, and tiles of two rows."""
    monkeypatch.setattr(module, "CHUNK", logits)
    monkeypatch.setattr(module, "ROWS", 1)
    monkeypatch.setattr(module, "TILE", 50 * 2)


@pytest.mark.parametrize("cap", [None, 2.0, 30.0])
@pytest.mark.parametrize("chunk", [1, 50 * 3, 10**6])
def test_loss_and_gradients_are_those_of_all_logits_at_once(monkeypatch, cap, chunk):
    in_chunks(monkeypatch, chunk)
    torch.manual_seed(0)
    model = Model(torch.randn(50, 6) * 2, cap)
    hidden, targets = torch.randn(8, 6, requires_grad=True), torch.randint(0, 50, (8,))
    found, logps, _ = summed_cross_entropy(model, hidden, targets, 0.25)
    expected = direct(model, hidden, targets, 0.25)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(-0.25 * logps.sum(), expected)
    of = [hidden, model.head.weight]
    for one, other in zip(torch.autograd.grad(3 * found, of), torch.autograd.grad(3 * expected, of), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 50 * 3, 10**6])
def test_weights_temperature_and_entropies_are_those_of_all_logits_at_once_in_float64(
    monkeypatch, cap, temperature, chunk
):
    in_chunks(monkeypatch, chunk)
    torch.manual_seed(0)
    model = Model(torch.randn(50, 6, dtype=torch.float64) * 2, cap)
    hidden, targets = torch.randn(8, 6, dtype=torch.float64, requires_grad=True), torch.randint(0, 50, (8,))
    weights = torch.randn(8, dtype=torch.float64)
    loss, logps, entropies = weighted_cross_entropy(model, hidden, targets, weights, temperature)
    logits = hidden @ model.head.weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    choice = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(logps, choice.log_prob(targets))
    torch.testing.assert_close(entropies, choice.entropy())
    expected = -(weights * choice.log_prob(targets)).sum()
    torch.testing.assert_close(loss, expected)
    of = [hidden, model.head.weight]
    for one, other in zip(torch.autograd.grad(3 * loss, of), torch.autograd.grad(3 * expected, of), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(target_logps(model, hidden, targets, temperature), choice.log_prob(targets))


def test_a_target_without_any_probability_in_fp32_has_a_finite_log_prob():
    model = Model(torch.tensor([[0.0], [200.0]]), None)
    logps = target_logps(model, torch.ones(1, 1), torch.tensor([0]), 1.0)
    assert logps.tolist() == [-200.0]


def test_states_of_half_precision_are_summed_in_fp32():
    torch.manual_seed(0)
    model = Model(torch.randn(5000, 6).bfloat16(), 30.0)
    hidden, targets = torch.randn(4, 6).bfloat16().requires_grad_(), torch.tensor([1, 2, 3, 4])
    loss, logps, _ = summed_cross_entropy(model, hidden, targets, 1 / 3)
    expected = direct(model, hidden, targets, 1 / 3)
    assert logps.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for one, other in zip(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden), strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


def test_a_loss_by_hand():
    """Logits (0, ln 3) and cap None: p = (1/4, 3/4), so -log p_0 = ln 4 and d/dz = (1/4 - 1, 3/4)."""
    model = Model(torch.tensor([[0.0], [1.0]]), None)
    hidden = torch.tensor([[3.0]]).log().requires_grad_()
    loss, _, hits = summed_cross_entropy(model, hidden, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())
    assert model.head.weight.grad.flatten().tolist() == pytest.approx([-0.75 * 1.0986123, 0.75 * 1.0986123])
    assert hidden.grad.item() == pytest.approx(0.75)
    assert hits.tolist() == [False]


def test_a_frozen_head_gets_no_gradient_and_no_grad_needs_none():
    model = Model(torch.randn(50, 6), None)
    model.head.weight.requires_grad_(False)
    hidden = torch.randn(4, 6, requires_grad=True)
    summed_cross_entropy(model, hidden, torch.tensor([1, 2, 3, 4]))[0].backward()
    assert model.head.weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not summed_cross_entropy(model, hidden, torch.tensor([1, 2, 3, 4]))[0].requires_grad


def test_heads_with_a_bias_or_a_scale_are_not_plain():
    model = random_model()
    assert plain_head(model)
    model.config.logit_scale = 0.5
    assert not plain_head(model)
    model.config.logit_scale = 1.0
    assert plain_head(model)
    del model.config.logit_scale
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    assert not plain_head(model)
