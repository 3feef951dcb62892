"""What `gkd.py` takes for granted about TRL 1.16, that our loss and gradient are TRL's, and the schedule of a run.

A failure of the first kind after an upgrade says which private hook moved.
"""

import inspect

import pytest
import torch
from datasets import Dataset
from distilling import arguments, ending_model, make, material
from transformers import Trainer
from trl import DistillationTrainer
from trl_layout import trl_layout

from gemma2.posttrain.data.examples import Example
from gemma2.posttrain.distillation.divergence import Divergence
from gemma2.posttrain.distillation.gkd import GkdTrainer, schedule
from gemma2.posttrain.tiny.networks import tiny_tokenizer

OVERRIDDEN = {
    DistillationTrainer: {
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
        "_save_checkpoint": ["self", "model", "trial"],
    },
    Trainer: {
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    },
}


# --- what is taken for granted about TRL ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [(owner, name, parameters) for owner, hooks in OVERRIDDEN.items() for name, parameters in hooks.items()],
)
def test_the_hooks_that_are_overridden_exist_with_these_parameters(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


@pytest.mark.filterwarnings("ignore")  # third parties warn at will in a bare trainer
def test_trl_asks_for_a_batch_once_per_step_and_feeds_the_loss_every_row_of_it_once(tmp_path, monkeypatch):
    trainer = make(tmp_path, n=2, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    asked, produced, consumed = [], [], []
    generate, loss = GkdTrainer._generate_and_score_completions, GkdTrainer._compute_loss

    def spy_generate(self, inputs):
        asked.append([row["prompt"] for row in inputs])
        batch = generate(self, inputs)
        produced.extend(batch["ids"].tolist())
        return batch

    def spy_loss(self, student, inputs, count):
        consumed.extend(inputs["ids"].tolist())
        assert count == inputs["num_items_in_batch"]
        return loss(self, student, inputs, count)

    monkeypatch.setattr(GkdTrainer, "_generate_and_score_completions", spy_generate)
    monkeypatch.setattr(GkdTrainer, "_compute_loss", spy_loss)
    trainer.train()
    assert [len(indices) for indices in asked] == [8, 8]
    assert [i for indices in asked for i in indices] == trainer.train_dataset["prompt"][:]
    assert sorted(produced) == sorted(consumed)
    assert trainer.loss_is_scaled_for_ga is True
    assert trainer.teacher_model is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("divergence", "beta"), [("forward-kl", 0.0), ("reverse-kl", 1.0), ("jsd", 0.3)])
def test_our_loss_and_gradient_are_trl_s_on_the_same_batch(tmp_path, divergence, beta):
    """TRL's beta runs from forward KL at 0 to reverse KL at 1, with the teacher's weight in between, as ours."""
    ours = make(tmp_path, divergence=Divergence(divergence, beta))
    batch = ours._generate_and_score_completions([{"prompt": i, "on_policy": 1} for i in (0, 1, 2, 3)])
    assert len(set(batch["mask"].sum(1).tolist())) > 1
    loss, entropy, count = ours._compute_loss(ours.model, batch, batch["num_items_in_batch"])
    loss.backward()
    theirs = DistillationTrainer(
        model=ending_model(0),
        teacher_model=ending_model(1),
        args=arguments(tmp_path, beta=beta),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tiny_tokenizer(),
    )
    expected, entropies, tokens = theirs._compute_loss(theirs.model, trl_layout(batch), batch["num_items_in_batch"])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy / count, entropies / tokens, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in ours.model.named_parameters()}
    for name, parameter in theirs.model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


# --- the schedule -----------------------------------------------------------------------------------------------------


def plan(steps, fraction, seed=0, n=2, batch_size=4):
    rows = material(ending_model(), [Example([2, 5, 6], [False, True, True])] * 5)
    found = schedule(steps, batch_size, n, rows, fraction, seed)
    return [
        (set(found["on_policy"][i : i + batch_size]), found["prompt"][i : i + batch_size])
        for i in range(0, steps * batch_size, batch_size)
    ]


def test_a_step_is_wholly_on_policy_or_wholly_on_fixed_data_in_the_given_share():
    steps = plan(2000, 0.3)
    assert all(len(kinds) == 1 for kinds, _ in steps)
    share = sum(kinds == {1} for kinds, _ in steps) / 2000
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert all(kinds == {1} for kinds, _ in plan(50, 1.0))
    assert all(kinds == {0} for kinds, _ in plan(50, 0.0))


def test_a_prompt_stands_in_its_step_n_times_and_every_one_is_met_before_any_is_met_again():
    answered = [indices for kinds, indices in plan(200, 0.5) if kinds == {1}]
    assert all(indices[0] == indices[1] and indices[2] == indices[3] for indices in answered)
    order = [i for indices in answered for i in indices[::2]]
    assert all(sorted(order[i : i + 12]) == list(range(12)) for i in range(0, len(order) - 12, 12))


def test_the_schedule_follows_from_the_seed():
    assert plan(30, 0.5) == plan(30, 0.5)
    assert plan(30, 0.5) != plan(30, 0.5, seed=1)
