"""Scores are those of the completion tokens alone, whatever else is in the batch."""

import math

import pytest
import torch

from gemma2.core.errors import InputError
from gemma2.posttrain.models import scorer
from gemma2.posttrain.models.scorer import head_logps, mean_and_error, token_logps
from gemma2.posttrain.tiny.networks import random_model

VOCAB = 512


@pytest.fixture(scope="module")
def model():
    return random_model(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 7), (12, 1), (3, 20), (9, 4), (1, 9)]
    draw = [torch.randint(4, 100, (a + b,), generator=generator).tolist() for a, b in lengths]
    return [ids[:a] for ids, (a, _) in zip(draw, lengths, strict=True)], [
        ids[a:] for ids, (a, _) in zip(draw, lengths, strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_transformers_logits(model, pairs, temperature):
    prompts, completions = pairs
    scored = token_logps(model, prompts, completions, temperature=temperature)
    for prompt, completion, logps in zip(prompts, completions, scored, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double()
        for t, token in enumerate(completion):
            expected = torch.log_softmax(logits[len(prompt) + t - 1] / temperature, -1)[token]
            assert logps[t].item() == pytest.approx(expected.item(), abs=2e-5)
        assert logps.dtype == torch.float32


def test_log_probs_depend_on_neither_batch_nor_order(model, pairs):
    prompts, completions = pairs
    together = token_logps(model, prompts, completions, batch_size=8)
    alone = token_logps(model, prompts, completions, batch_size=1)
    turned = token_logps(model, prompts[::-1], completions[::-1], batch_size=2)[::-1]
    for a, b, c in zip(together, alone, turned, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(a, c, atol=1e-5)


def test_the_final_soft_cap_is_applied(model, pairs):
    uncapped = random_model(attn_logit_softcapping=5.0, final_logit_softcapping=None)
    prompts, completions = pairs
    ours, theirs = (torch.cat(token_logps(m, prompts, completions)) for m in (model, uncapped))
    assert (ours - theirs).abs().max() > 0.1


def test_chunks_of_the_head_change_neither_value_nor_gradient(model, monkeypatch):
    hidden = torch.randn(11, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(11)
    weights = torch.linspace(-1, 1, 11)
    results = []
    for chunk in (2**24, 3 * VOCAB):
        monkeypatch.setattr(scorer, "CHUNK", chunk)
        logps, entropies = head_logps(model, hidden, targets, 0.8)
        (gradient,) = torch.autograd.grad((logps * weights).sum(), hidden)
        results.append((logps, entropies, gradient))
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, atol=1e-6)


def test_entropy_of_a_uniform_policy_is_the_log_of_the_vocabulary():
    flat = random_model()
    with torch.no_grad():
        flat.model.embed_tokens.weight.zero_()
    _, entropies = head_logps(flat, torch.randn(3, 16), torch.tensor([1, 2, 3]), 1.0)
    assert torch.allclose(entropies, torch.full((3,), math.log(VOCAB)), atol=1e-5)


def test_mean_and_standard_error_by_hand():
    # mean 2; variance (1 + 0 + 1) / 2 = 1; error sqrt(1 / 3)
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0]))
    assert (mean, error) == (2.0, pytest.approx(math.sqrt(1 / 3)))
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])


def test_a_head_in_one_pass_scores_as_a_head_in_chunks(model, pairs, monkeypatch):
    wanted = token_logps(model, *pairs, temperature=0.7)
    monkeypatch.setattr(scorer, "head_in_one_pass", lambda model, hidden: False)
    for one, other in zip(token_logps(model, *pairs, temperature=0.7), wanted, strict=True):
        assert torch.allclose(one, other, atol=2e-6)


def test_a_model_that_scales_its_logits_is_refused():
    model = random_model()
    model.config.logit_scale = 0.5
    with pytest.raises(InputError, match="scales its logits"):
        token_logps(model, [[5]], [[6]])
