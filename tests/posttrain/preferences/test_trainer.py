"""The reward model's loss and gradients: by hand, compared to TRL's, and independent of how a batch is split."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from gemma2.posttrain.models.loading import quiet_libraries
from gemma2.posttrain.preferences.pair_examples import PairIds, to_dataset
from gemma2.posttrain.preferences.reward_trainer import make_trainer, pair_loss
from gemma2.posttrain.preferences.states import all_positions, last_position
from gemma2.posttrain.runs.run_directory import Run, RunOptions
from gemma2.posttrain.schemas import RewardConfig
from gemma2.posttrain.tiny.networks import random_reward_model, tiny_tokenizer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def draw_pairs(count=8, margins=False):
    draw = torch.Generator().manual_seed(0)

    def ids(low, high):
        return torch.randint(5, 400, (int(torch.randint(low, high, (), generator=draw)),), generator=draw).tolist()

    pairs = []
    for i in range(count):
        prompt = ids(3, 15)
        pairs.append(PairIds(prompt + ids(1, 30), prompt + ids(1, 30), len(prompt), i / 4 if margins else None))
    return pairs


@pytest.fixture
def trainer_of(tmp_path):
    quiet_libraries()

    def make(model, pairs, micro=8, **fields):
        config = RewardConfig(model="m", data="d", batch_size=8, micro_batch_size=micro, **fields)
        run = Run("reward", tmp_path, RunOptions(tmp_path / "out"), {"config": {}}, resumed=False)
        return make_trainer(model, tiny_tokenizer(), pairs, config, run, 8 // micro)

    return make


def step(trainer):
    """Loss and gradients of the first optimizer batch, as training makes them."""
    epoch = iter(trainer.get_train_dataloader())
    steps = trainer.args.gradient_accumulation_steps
    trainer.create_optimizer()
    batches, count = trainer.get_batch_samples(epoch, steps, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, count).item() for batch in batches)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_the_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0])
    margin = torch.tensor([0.25, 0.0])
    found = pair_loss(chosen, rejected, margin, 0.1)
    # differences less the margin 0.75, -1.5; sums 1.0, 2.5
    expected = [math.log1p(math.exp(-0.75)) + 0.1 * 1.0**2, math.log1p(math.exp(1.5)) + 0.1 * 2.5**2]
    assert found.tolist() == pytest.approx(expected)
    plain = pair_loss(chosen, rejected, None, 0.0)
    assert plain.tolist() == pytest.approx([math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.5))])


@pytest.mark.parametrize("fields", [{}, {"center_coefficient": 0.05}])
def test_one_batch_gives_trl_s_loss_and_gradient(tmp_path, trainer_of, fields):
    pairs = draw_pairs(margins=True)
    loss, gradients = step(trainer_of(random_reward_model(**HEADS), pairs, **fields))
    reference = RewardTrainer(
        model=random_reward_model(**HEADS),
        args=TrlRewardConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,
            activation_checkpointing=False,
            center_rewards_coefficient=fields.get("center_coefficient"),
        ),
        train_dataset=to_dataset(pairs),
        processing_class=tiny_tokenizer(),
    )
    expected_loss, expected = step(reference)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(gradients, expected)


def test_a_tie_counts_half_as_in_an_evaluation(trainer_of):
    trainer = trainer_of(random_reward_model(), draw_pairs())
    trainer._rewards.append(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 2.0, 0.0]]))  # right, wrong, two ties
    logged = []
    trainer.model.train()
    trainer.add_callback(type("Keep", (TrainerCallback,), {"on_log": lambda *_, logs, **__: logged.append(logs)}))
    trainer.log({"loss": 0.0})
    assert logged[0]["accuracy"] == 0.5


@pytest.mark.parametrize("micro", [1, 4])
def test_the_split_into_micro_batches_does_not_change_the_loss(trainer_of, micro):
    pairs = draw_pairs()
    whole_loss, whole = step(trainer_of(random_reward_model(), pairs, micro=8))
    cut_loss, cut = step(trainer_of(random_reward_model(), pairs, micro=micro))
    assert cut_loss == pytest.approx(whole_loss, rel=1e-6)
    assert_same_gradients(cut, whole)


def test_a_last_batch_that_is_not_full_is_a_mean_over_its_pairs(trainer_of):
    # Five pairs in micro-batches of 4 and 1: a mean of means would give the last one the weight of four.
    pairs = draw_pairs(5)
    model = random_reward_model()
    loss, _ = step(trainer_of(model, pairs, micro=4))
    rewards = [[model(torch.tensor([side])).logits.item() for side in (p.chosen, p.rejected)] for p in pairs]
    assert loss == pytest.approx(sum(math.log1p(math.exp(r - c)) for c, r in rewards) / 5, rel=1e-5)


def test_parts_of_a_few_tokens_change_nothing(trainer_of):
    trainer = trainer_of(random_reward_model(), draw_pairs())
    whole_loss, whole = step(trainer)
    small = trainer_of(random_reward_model(), draw_pairs())
    small.part_tokens = 40
    loss, gradients = step(small)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert_same_gradients(gradients, whole)


@pytest.mark.parametrize("window", [4, 64])
def test_the_last_position_equals_that_of_transformers(window):
    model = random_reward_model(sliding_window=window, num_hidden_layers=3, **HEADS)
    ids, lengths = torch.randint(5, 400, (3, 20), generator=torch.Generator().manual_seed(1)), torch.tensor([20, 1, 13])
    reference = model.model(input_ids=ids).last_hidden_state[torch.arange(3), lengths - 1]
    torch.testing.assert_close(last_position(model, ids, lengths), reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(all_positions(model, ids, lengths), reference, atol=1e-5, rtol=1e-5)


def test_another_architecture_goes_through_all_positions(trainer_of):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_labels=1, vocab_size=512, pad_token_id=0, **HEADS
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    pairs = draw_pairs()
    rewards = [[model(torch.tensor([side])).logits.item() for side in (p.chosen, p.rejected)] for p in pairs]
    loss, gradients = step(trainer_of(model, pairs))
    assert loss == pytest.approx(sum(math.log1p(math.exp(r - c)) for c, r in rewards) / 8, rel=1e-5)
    assert gradients["model.embed_tokens.weight"].norm() > 0


def test_dropout_acts_while_training_only(trainer_of):
    pairs = draw_pairs()
    plain_loss, _ = step(trainer_of(random_reward_model(), pairs))
    trainer = trainer_of(random_reward_model(), pairs, dropout=0.3)
    assert step(trainer)[0] != pytest.approx(plain_loss, rel=1e-3)
    ids = torch.tensor([pairs[0].chosen])
    trainer.model.eval()
    expected = random_reward_model()(ids).logits
    torch.testing.assert_close(trainer.model(ids).logits, expected)
    lengths = torch.tensor([ids.shape[1]])
    state = last_position(trainer.model, ids, lengths, trainer.dropout)
    torch.testing.assert_close(trainer.model.score(state), expected)


def test_dropout_of_every_block_s_output_is_unbiased_and_has_the_requested_share():
    model = random_reward_model()
    outputs = []
    from gemma2.posttrain.preferences.reward_trainer import drop_block_outputs

    clean = model.model.layers[0].mlp(torch.ones(1, 1, 16))
    drop_block_outputs(model, 0.25)
    model.train()
    outputs = torch.stack([model.model.layers[0].mlp(torch.ones(1, 1, 16)) for _ in range(2000)])
    dropped = (outputs == 0).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.02)  # standard deviation 0.003
    torch.testing.assert_close(outputs.mean(0), clean, rtol=0.1, atol=1e-3)


def test_lora_dropout_is_not_switched_off(trainer_of):
    # TRL's disable_dropout would.
    trainer = trainer_of(random_reward_model(), draw_pairs(), lora_rank=2, lora_dropout=0.4)
    shares = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert shares == {0.4}
