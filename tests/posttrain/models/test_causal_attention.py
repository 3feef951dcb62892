"""Attention in blocks: outputs and gradients of transformers' eager attention, whatever block, window and cap."""

from __future__ import annotations

import pytest
import torch

from gemma2.posttrain.models import causal_attention as module
from gemma2.posttrain.models.attention import causal_masks
from gemma2.posttrain.models.causal_attention import blockwise, can_be_blockwise, causal_attention
from gemma2.posttrain.tiny.networks import random_model


def by_hand(query, key, value, scale, cap, window):
    """The whole score matrix, keys and values repeated for their group, by autograd."""
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)  # of a key, seen from a query
    seen = (age >= 0) & (age < (window or tokens))
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_outputs_and_gradients_equal_those_by_hand(monkeypatch, cap, window, block):
    monkeypatch.setattr(module, "BLOCK", block)
    torch.manual_seed(0)
    shapes = [(2, 4, 9, 3), (2, 2, 9, 3), (2, 2, 9, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    found, expected = (f(*inputs, 0.7, cap, window) for f in (causal_attention, by_hand))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_whole_gemma_2_gives_the_same_states_and_gradients(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    model = random_model(num_hidden_layers=3, num_key_value_heads=1)
    assert can_be_blockwise(model)
    ids = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(0))

    def run():
        model.zero_grad()
        states = model.base_model(
            input_ids=ids, attention_mask=masks, position_ids=torch.arange(40)[None], use_cache=False
        ).last_hidden_state
        return states

    masks = causal_masks(model, 40)
    assert model.config.sliding_window < 40, "a local layer hides something"
    gradients = []
    for context in (None, blockwise(model)):
        if context is None:
            states = run()
        else:
            with context:
                states = run()
            assert model.config._attn_implementation == "eager", "only inside"
        states.square().sum().backward()
        gradients.append([states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_without_a_gradient_the_outputs_are_the_same():
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 9, 3), (2, 2, 9, 3), (2, 2, 9, 3))]
    for cap in (None, 2.0):
        wanted = causal_attention(*inputs, 0.7, cap, 4)
        with torch.no_grad():
            assert torch.equal(causal_attention(*inputs, 0.7, cap, 4), wanted)
