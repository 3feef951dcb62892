"""Logits are not rounded to half precision anywhere: sampler, scorer and losses see the same fp32 head."""

import pytest
import torch
from test_decoder import MODELS, made
from test_sampler import PAD, gemma, prompts_of

from gemma2.core.errors import InputError
from gemma2.posttrain.models import decoder, sampler
from gemma2.posttrain.models.decoder import StepDecoder
from gemma2.posttrain.models.head import head_logits, states_of_head, wide_linear
from gemma2.posttrain.models.sampler import SamplingParams, draw, sample
from gemma2.posttrain.models.scorer import head_logps, last_hidden_states


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def exact(hidden, weight):
    return hidden.double() @ weight.double().T


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_a_product_of_any_precision_is_exact_to_fp32(hidden_dtype, weight_dtype, cast):
    generator = torch.Generator().manual_seed(0)
    hidden = (20 * torch.randn(2, 5, 32, generator=generator)).to(hidden_dtype)
    weight = torch.randn(40000, 32, generator=generator).to(weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        logits = wide_linear(hidden, weight)
    assert logits.dtype == torch.float32 and logits.shape == (2, 5, 40000)
    assert (logits - exact(hidden, weight)).abs().max() < 1e-3  # of 500; bf16 would be off by 1


def test_gradients_reach_both_factors():
    hidden = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    with autocast():
        loss = wide_linear(hidden, weight).square().sum()
    loss.backward()
    logits = exact(hidden.detach(), weight.detach())
    assert torch.allclose(weight.grad.double(), 2 * logits.T @ hidden.detach().double(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(hidden.grad.double(), 2 * logits @ weight.detach().double(), rtol=0.02, atol=0.1)


def test_the_head_has_bias_and_cap_and_declines_other_scalings():
    model = gemma()
    hidden = torch.randn(4, 16)
    plain = hidden @ model.lm_head.weight.T
    assert torch.allclose(head_logits(model, hidden), 3 * torch.tanh(plain / 3), atol=1e-5)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(plain.shape[1]))
    assert torch.allclose(head_logits(model, hidden), 3 * torch.tanh((plain + model.lm_head.bias) / 3), atol=1e-5)
    model.config.logit_scale = 0.5
    with pytest.raises(InputError, match="logit_scale"):
        head_logits(model, hidden)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["autocast", "bf16 weights"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_sampler_draws_from_logits_that_are_not_rounded_to_bf16(name, how, fast, monkeypatch):
    """From the prefill on, through the fast decoder and through transformers."""
    seen = []
    monkeypatch.setattr(sampler, "draw", lambda logits, *rest: seen.append(logits.clone()) or draw(logits, *rest))
    monkeypatch.setattr(StepDecoder, "fits", staticmethod(lambda model: fast))
    model = made(name) if how == "autocast" else made(name).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        sample(model, prompts_of([6, 14]), SamplingParams(3), [], PAD, torch.Generator().manual_seed(0))
    assert len(seen) == 3
    for logits in seen:
        assert (logits.bfloat16().float() != logits).float().mean() > 0.9


def test_losses_see_the_head_in_fp32_under_autocast():
    """The log-probs of the RL loss, against float64 of the same states: bf16 logits near 25 would be off by 0.06."""
    model = gemma()
    model.config.final_logit_softcapping = 30.0
    ids = torch.tensor([[5, 9, 3, 7, 11, 4]])
    with autocast(), torch.no_grad():
        hidden = 8 * last_hidden_states(model, ids)[0]
        logps, _ = head_logps(model, hidden, torch.tensor([9, 3, 7, 11, 4, 2]), 1.0)
    plain = exact(states_of_head(hidden), model.lm_head.weight)
    expected = torch.log_softmax(30 * torch.tanh(plain / 30), -1)[range(6), [9, 3, 7, 11, 4, 2]]
    assert plain.abs().max() > 20
    assert (logps - expected).abs().max() < 1e-4


def test_a_decoder_under_autocast_converts_the_weights_once(monkeypatch):
    model = made("llama")
    with autocast(), torch.no_grad():
        fast = decoder.StepDecoder(model, 32)
    assert fast.layers[0].qkv.weight.dtype == torch.bfloat16
    assert fast.head is model.lm_head.weight  # fp32, shared
    narrow = decoder.StepDecoder(made("llama").bfloat16(), 32)
    assert narrow.head.dtype == torch.float32
    monkeypatch.setattr(decoder, "WIDENED", 10)
    assert decoder.StepDecoder(made("llama").bfloat16(), 32).head.dtype == torch.bfloat16
