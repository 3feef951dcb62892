"""The loss of a batch of RL: REINFORCE by hand, however it is cut into parts and whatever attention the model has."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gemma2.posttrain.models import cross_entropy, scorer
from gemma2.posttrain.models.sampler import SamplingParams, decode
from gemma2.posttrain.models.scorer import similar_rows, token_logps
from gemma2.posttrain.rl import objective
from gemma2.posttrain.rl.objective import loss_parts, policy_loss
from gemma2.posttrain.rl.rloo import AnchoredRlooTrainer
from gemma2.posttrain.tiny.networks import random_model

TEMPERATURE = 0.8


def llama(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def batch():
    """Five rows of 3 prompt tokens and 2 to 13 completion tokens, right-padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([13, 2, 7, 2, 9])
    ids = torch.randint(4, 500, (5, 16), generator=generator)
    column = torch.arange(16)
    mask = (column >= 3) & (column < 3 + lengths[:, None])
    return ids.masked_fill(column >= 3 + lengths[:, None], 0), mask, torch.randn(5, generator=generator)


def by_hand(model, ids, mask, advantages):
    """(loss, sum of entropies) from all logits, by autograd, with transformers' eager attention."""
    choice = torch.distributions.Categorical(logits=model(ids).logits[:, :-1] / TEMPERATURE)
    logps = (choice.log_prob(ids[:, 1:]) * mask[:, 1:]).sum(1)
    return -(advantages * logps).mean(), (choice.entropy() * mask[:, 1:]).sum()


def gradients(model, *losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("in_one_pass", [True, False])
@pytest.mark.parametrize("parts", [True, False])
def test_loss_gradient_and_entropy_by_hand_in_float64(monkeypatch, in_one_pass, parts):
    monkeypatch.setattr(scorer.similar_rows, "__defaults__", (20, 2))
    monkeypatch.setattr(cross_entropy, "ROWS", 4)
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    if not in_one_pass:
        monkeypatch.setattr(objective, "head_in_one_pass", lambda model, hidden: False)
    model = random_model(attn_logit_softcapping=5.0, final_logit_softcapping=3.0).double()
    ids, mask, advantages = batch()
    expected, entropies = by_hand(model, ids, mask, advantages)
    wanted = gradients(model, expected)
    pieces = list(loss_parts(ids, mask, advantages, whole=not parts))
    assert (len(pieces) > 1) == parts
    found = [policy_loss(model, *piece, TEMPERATURE) for piece in pieces]
    assert sum(loss.item() for loss, _, _ in found) == pytest.approx(expected.item(), rel=1e-5)
    assert sum(entropy.item() for _, entropy, _ in found) == pytest.approx(entropies.item(), rel=1e-5)
    assert sum(tokens for _, _, tokens in found) == int(mask.sum())
    for name, gradient in gradients(model, *(loss for loss, _, _ in found)).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name  # norms are in fp32


def test_parts_hold_every_row_once_and_are_no_wider_than_their_longest_row(monkeypatch):
    monkeypatch.setattr(scorer.similar_rows, "__defaults__", (20, 2))
    ids, mask, advantages = batch()
    rows = []
    for part, inside, scaled in loss_parts(ids, mask, advantages):
        assert inside[:, -1].any()
        rows += [(row[m].tolist(), a * len(ids) / len(part)) for row, m, a in zip(part, inside, scaled, strict=True)]
    wanted = [(row[m].tolist(), a) for row, m, a in zip(ids, mask, advantages, strict=True)]
    assert len(rows) == len(wanted)
    for completion, advantage in wanted:
        assert any(completion == c and torch.isclose(advantage, a) for c, a in rows)


def test_the_cheapest_cut_of_the_sorted_rows_by_hand():
    # 10 10 | 4 4 4: 20 + 5 and 12 + 5 are 42; all in one 50 + 5; a part for each length is this one.
    assert similar_rows([4, 10, 4, 10, 4], tokens=100, cost=5) == [[1, 3], [0, 2, 4]]
    assert similar_rows([4, 10, 4, 10, 4], tokens=100, cost=50) == [[1, 3, 0, 2, 4]]
    assert similar_rows([10, 10, 10], tokens=20, cost=1) in ([[0, 1], [2]], [[0], [1, 2]])
    assert similar_rows([30], tokens=20, cost=1) == [[0]]
    assert similar_rows([], tokens=20, cost=1) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flex attention of transformers and torch
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_scores_and_samples_with_other_attention_are_those_of_eager(attention):
    eager, other = llama("eager"), llama(attention)
    other.load_state_dict(eager.state_dict())
    prompts, completions = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 15]]
    for one, two in zip(*(token_logps(model, prompts, completions) for model in (eager, other)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    uniforms = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = [decode(model, prompts, SamplingParams(6), [1], 0, uniforms) for model in (eager, other)]
    assert [ids for ids, _, _ in drawn[0]] == [ids for ids, _, _ in drawn[1]]
    assert other.config._attn_implementation == attention


def test_the_loss_with_sdpa_is_that_of_eager():
    eager, other = llama("eager"), llama("sdpa")
    other.load_state_dict(eager.state_dict())
    wanted, found = (gradients(model, policy_loss(model, *batch(), TEMPERATURE)[0]) for model in (eager, other))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-4)


def test_layers_that_are_recomputed_meet_the_same_attention_twice():
    model = random_model()
    wanted = gradients(model, policy_loss(model, *batch(), TEMPERATURE)[0])
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    for name, gradient in gradients(model, policy_loss(model, *batch(), TEMPERATURE)[0]).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)


def test_parts_that_the_trainer_spends_one_by_one_leave_the_whole_batch_s_gradient(monkeypatch):
    """As `AnchoredRlooTrainer._loss` does it: all but the last part are propagated at once, the last by the caller."""
    monkeypatch.setattr(scorer.similar_rows, "__defaults__", (20, 2))
    model = random_model()
    ids, mask, advantages = batch()
    wanted = gradients(model, policy_loss(model, ids, mask, advantages, TEMPERATURE)[0])
    spent: list[float] = []

    def backward(loss):
        spent.append(loss.item())
        loss.backward()

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=1, backward=backward, autocast=nullcontext, gather=lambda values: values
        ),
        trained=model,
        sharded=False,
        temperature=TEMPERATURE,
        current_gradient_accumulation_steps=1,
        _entropy=torch.zeros(2),
    )
    model.zero_grad()
    loss = AnchoredRlooTrainer._loss(trainer, {"ids": ids, "mask": mask, "advantages": advantages})
    assert len(spent) >= 1
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(model, ids, mask, advantages)[0].item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
    entropies = by_hand(model, ids, mask, advantages)[1].item()
    assert trainer._entropy.tolist() == pytest.approx([entropies, int(mask.sum())], rel=1e-5)
