"""Heads: a linear probe against an independent fit, heads taken from other reward models, averages of members."""

from __future__ import annotations

import json
import math

import pytest
import torch
from row_reading import read_pairs
from safetensors.torch import load_file

from gemma2.core.errors import InputError
from gemma2.merging import MergeRequest, merge
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.preferences.heads import starting_model
from gemma2.posttrain.preferences.probe import fit_head, run_probe
from gemma2.posttrain.preferences.train import run_reward
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import ProbeConfig, RewardConfig
from gemma2.posttrain.tiny.networks import save_random

SCORE = "score.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"{'very ' * (i % 3)}good {i}", "rejected": f"bad {i % 7}"}
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_bytes(b"".join(map(to_line, rows)))
    save_random(folder / "model")
    config = ProbeConfig(model=folder / "model", data=folder / "pairs.jsonl", l2=1e-2, eval_fraction=0.2)
    run_probe(config, RunOptions(folder / "probe"))
    return folder


@pytest.fixture
def noting(interrupting):
    """A progress that keeps its notes."""
    progress = interrupting(10**9)
    progress.notes = []
    progress.note = progress.notes.append
    return progress


def head_of(path):
    return load_file(path / "model.safetensors")[SCORE][0].double()


def independent_fit(differences, l2):
    """Logistic regression by L-BFGS on autograd's gradient, label 1 throughout."""
    w = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        labels = torch.ones(len(differences), dtype=torch.float64)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(differences @ w, labels) + l2 / 2 * w @ w
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


def test_a_probe_is_the_logistic_regression_on_frozen_states(inputs):
    from gemma2.posttrain.data.chat import ChatFormat
    from gemma2.posttrain.data.rows import split

    model = RewardModel.from_dir(inputs / "probe")
    pairs, _ = split(read_pairs(inputs / "pairs.jsonl"), 0.2, 0)
    chat = ChatFormat(model.tokenizer)
    differences = []
    for pair in pairs:
        sides = [chat.example([*pair.prompt, *side], "eot")[0] for side in (pair.chosen, pair.rejected)]
        states = [model.model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sides]
        differences.append((states[0] - states[1]).detach().double())
    expected = independent_fit(torch.stack(differences), l2=1e-2)
    torch.testing.assert_close(head_of(inputs / "probe"), expected, rtol=1e-3, atol=5e-4)


def test_a_probe_does_not_change_the_backbone(inputs):
    before, after = (load_file(inputs / name / "model.safetensors") for name in ("model", "probe"))
    assert after.keys() == before.keys() | {SCORE}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_probe_does_not_depend_on_the_seed(inputs, tmp_path):
    config = ProbeConfig(model=inputs / "model", data=inputs / "pairs.jsonl", eval_fraction=0)
    first, second = (
        run_probe(config.model_copy(update={"seed": seed}), RunOptions(tmp_path / str(seed))).out for seed in (0, 1)
    )
    assert torch.equal(head_of(first), head_of(second))


def test_the_fit_is_a_minimum_also_with_margins_and_centring():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 30, 4, generator=draw, dtype=torch.float64)
    margins = torch.rand(30, generator=draw, dtype=torch.float64)
    found, steps = fit_head(states, margins, l2=0.03, centring=0.2)
    w = found.clone().requires_grad_()
    chosen, rejected = states @ w
    loss = (torch.log1p(torch.exp(-(chosen - rejected - margins))) + 0.2 * (chosen + rejected) ** 2).mean()
    (loss + 0.015 * w.square().sum()).backward()
    assert w.grad.norm() < 1e-8 and steps < 20


def test_separable_pairs_have_a_finite_head():
    states = torch.stack([torch.ones(6, 2), -torch.ones(6, 2)]).double()
    head, _ = fit_head(states, torch.zeros(6).double(), l2=1e-4)
    # By symmetry w = (a, a), and l2 a = 2 sigmoid(-4 a): the gradient of the loss along it.
    assert head[0] == pytest.approx(head[1].item())
    assert 1e-4 * head[0].item() == pytest.approx(2 / (1 + math.exp(4 * head[0].item())), rel=1e-4)


def reward(inputs, out, **fields):
    given = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 4, "eval_fraction": 0.2} | fields
    config = RewardConfig(**{"model": inputs / "model", "data": inputs / "pairs.jsonl"} | given)
    return run_reward(config, RunOptions(out))


def test_training_starts_from_the_head_of_another_reward_model(inputs, tmp_path):
    fresh = reward(inputs, tmp_path / "fresh", max_steps=1, learning_rate=1e-12)
    shared = reward(inputs, tmp_path / "shared", max_steps=1, learning_rate=1e-12, from_head=inputs / "probe")
    torch.testing.assert_close(head_of(shared.out), head_of(inputs / "probe"), atol=1e-6, rtol=0)
    assert (head_of(fresh.out) - head_of(inputs / "probe")).norm() > 1e-2
    manifest = json.loads((shared.out / "gemma2.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["model", "from-head"]


def test_a_reward_model_keeps_its_head(inputs, interrupting):
    model, _ = starting_model(inputs / "probe", 0, None, interrupting())
    torch.testing.assert_close(model.score.weight[0].double(), head_of(inputs / "probe"))


def test_only_training_notes_that_the_head_is_kept(inputs, tmp_path, noting):
    fields = {"model": inputs / "probe", "data": inputs / "pairs.jsonl"}
    run_probe(ProbeConfig(**fields), RunOptions(tmp_path / "again"), noting)
    assert not any("its head is kept" in note for note in noting.notes)
    run_reward(RewardConfig(**fields, max_steps=1), RunOptions(tmp_path / "out"), noting)
    assert any("its head is kept" in note for note in noting.notes)


def test_several_outputs_are_refused_by_name(inputs, tmp_path, interrupting):
    _three_outputs(tmp_path / "three")
    for arguments in ((tmp_path / "three", 0, None), (inputs / "model", 0, tmp_path / "three")):
        with pytest.raises(InputError, match=r"three has 3 outputs on one backbone, a reward model has one"):
            starting_model(*arguments, interrupting())


def _three_outputs(path):
    from transformers import Gemma2ForSequenceClassification

    from gemma2.posttrain.tiny.networks import tiny_config, tiny_tokenizer

    Gemma2ForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)


def test_a_head_of_another_width_is_refused_and_of_another_backbone_warned_of(inputs, tmp_path, interrupting):
    save_random(tmp_path / "wide", kind="reward", hidden_size=32)
    with pytest.raises(InputError, match="the head reads 32 features, --model has 16"):
        starting_model(inputs / "model", 0, tmp_path / "wide", interrupting())
    with pytest.raises(InputError, match=r"model has no score\.weight"):
        starting_model(inputs / "model", 0, inputs / "model", interrupting())
    save_random(tmp_path / "other", seed=5)
    progress = interrupting()
    starting_model(tmp_path / "other", 0, inputs / "probe", progress)
    assert "was trained on another backbone" in progress.warnings[0]


def test_the_average_of_two_members_is_a_reward_model(inputs, tmp_path):
    members = [reward(inputs, tmp_path / str(seed), seed=seed, from_head=inputs / "probe").out for seed in (1, 2)]
    merge(MergeRequest(method="linear", models=tuple(members)), out=tmp_path / "warm")
    heads = [head_of(path) for path in members]
    torch.testing.assert_close(head_of(tmp_path / "warm"), (heads[0] + heads[1]) / 2, atol=1e-7, rtol=0)
    ids = [[2, 9, 10, 11], [2, 9, 12]]
    scores = [RewardModel.from_dir(path).score(ids, [[], []]) for path in (*members, tmp_path / "warm")]
    # Close members: the average of the weights scores nearly as the average of the scores does.
    torch.testing.assert_close(scores[2], (scores[0] + scores[1]) / 2, atol=0.05, rtol=0.05)
    assert not torch.equal(scores[2], scores[0])
