"""The SFT trainer: TRL's gradient, whatever the parts of a batch; packed rows; what leaves the loss to TRL."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gemma2.posttrain.data.examples import Example, to_dataset
from gemma2.posttrain.runs.run_directory import Run, RunOptions
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.sft.sft_trainer import make_trainer, pack, parts
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

LENGTHS = (30, 7, 12, 21)


def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(3, 500, (n,), generator=generator).tolist(), [t > n // 2 for t in range(n)])
        for n in LENGTHS
    ]


def trainer_of(tmp_path, **fields):
    config = SftConfig(model=tmp_path, data=tmp_path, batch_size=4, **fields)
    run = Run("sft", tmp_path, RunOptions(tmp_path / "out"), {"config": {}}, resumed=False)
    return make_trainer(random_model(), tiny_tokenizer(), rows(), config, run, accumulation=1)


def step(trainer, ours=True):
    """(loss, gradients by name) of the whole data as one batch."""
    trainer.scores_targets_only = ours
    collator = DataCollatorForLanguageModeling(0)
    batch = collator([{k: row[k] for k in ("input_ids", "labels")} for row in trainer.train_dataset])
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, batch, (batch["labels"] != -100).sum())
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 4}])
@pytest.mark.parametrize("tokens", [1, 45, 10**6])
def test_loss_and_gradient_are_trl_s(tmp_path, fields, tokens):
    trainer = trainer_of(tmp_path, micro_batch_tokens=tokens, **fields)
    if fields:  # B = 0 would leave A without a gradient
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    assert trainer.scores_targets_only
    loss, gradients = step(trainer)
    trainer.part_tokens = None
    expected_loss, expected = step(trainer, ours=False)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


def test_the_accuracy_is_trl_s(tmp_path):
    trainer = trainer_of(tmp_path)
    step(trainer)
    step(trainer, ours=False)
    ours, theirs = trainer._metrics["train"]["mean_token_accuracy"]
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    "trainer_options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"bf16": True}, {"padding_free": True}]
)
def test_other_losses_are_left_to_trl(tmp_path, trainer_options):
    assert not trainer_of(tmp_path, trainer=trainer_options).scores_targets_only


def test_recomputed_layers_keep_the_attention_of_the_forward_pass(tmp_path):
    trainer = trainer_of(tmp_path, trainer={"activation_checkpointing": True})
    loss, gradients = step(trainer)
    expected_loss, expected = step(trainer_of(tmp_path), ours=False)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


def test_parts_have_every_row_once_and_stay_under_the_limit():
    batch = DataCollatorForLanguageModeling(0)([{"input_ids": row.ids} for row in rows()])
    found = list(parts(batch, 45))
    assert [tuple(part["input_ids"].shape) for part in found] == [(2, 12), (1, 21), (1, 30)]
    assert sorted(int(part["attention_mask"].sum()) for part in found) == [7 + 12, 21, 30]
    assert [tuple(part["input_ids"].shape) for part in parts(batch, 1)] == [(1, 7), (1, 12), (1, 21), (1, 30)]


def test_packed_rows_are_whole_and_separate():
    packed = pack(rows(), 33)
    assert sorted(sorted(lengths) for lengths in packed["seq_lengths"]) == [[7], [12, 21], [30]]
    whole = {tuple(row.ids): row.mask for row in rows()}
    for pile in packed:
        start = 0
        for length in pile["seq_lengths"]:
            ids, labels = (pile[name][start : start + length] for name in ("input_ids", "labels"))
            assert [label != -100 for label in labels] == whole.pop(tuple(ids))
            start += length
    assert not whole
    collated = DataCollatorForLanguageModeling(0, padding_free=True)(
        [{k: pile[k] for k in ("input_ids", "labels", "seq_lengths")} for pile in packed]
    )
    assert (collated["position_ids"] == 0).sum() == len(LENGTHS) and "attention_mask" not in collated


def test_a_packed_batch_has_the_loss_of_its_rows(tmp_path):
    """Eager attention also separates packed rows by their position ids, only slowly; flash attention needs a GPU."""
    config = SftConfig(
        model=tmp_path, data=tmp_path, batch_size=4, max_length=33, attention="flash_attention_2", packing=True
    )
    run = Run("sft", tmp_path, RunOptions(tmp_path / "out"), {"config": {}}, resumed=False)
    trainer = make_trainer(random_model(), tiny_tokenizer(), rows(), config, run, accumulation=1)
    assert not trainer.scores_targets_only and len(trainer.train_dataset) == 3
    (batch,) = trainer.get_train_dataloader()
    count = (batch["labels"] != -100).sum()
    packed = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    expected, _ = step(trainer_of(tmp_path))
    assert packed.item() == pytest.approx(expected, rel=1e-5)


def test_the_data_set_has_labels_on_targets_alone():
    dataset = to_dataset([Example([5, 6, 7], [False, True, False])])
    assert dataset[0] == {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "length": 3}
