"""Reward models: what the model reads, Bradley-Terry, invariance of scores, held-out figures by hand, resume."""

from __future__ import annotations

import json
import math
import random
import signal

import pytest
import torch
from processes import MAIN, gemma2, start
from row_reading import plain_reading, read_pairs
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from waiting import wait_for

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import split
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.models.loading import init_reward_model
from gemma2.posttrain.preferences.pair_examples import PairIds, tokenise_pairs
from gemma2.posttrain.preferences.probe import run_probe
from gemma2.posttrain.preferences.reward_trainer import make_trainer
from gemma2.posttrain.preferences.train import measure, run_reward
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import ProbeConfig, RewardConfig
from gemma2.posttrain.tiny.networks import random_reward_model, save_random, tiny_tokenizer

WORDS = ["honey", "glass", "wool", "salt", "copper"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Pairs whose better side says please at the end."""
    folder = tmp_path_factory.mktemp("reward")
    draw = random.Random(0)
    rows = []
    for i in range(60):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 6))]
        better, worse = [*words, "please"], ["please", *words]
        rows.append({"prompt": f"What is {i}?", "chosen": " ".join(better), "rejected": " ".join(worse)})
    (folder / "pairs.jsonl").write_bytes(b"".join(map(to_line, rows)))
    save_random(folder / "model")
    return folder


def configure(inputs, **fields):
    given = {"learning_rate": 1e-2, "batch_size": 12, "eval_fraction": 0.2, "save_every": 3, "epochs": 3, **fields}
    return RewardConfig(model=inputs / "model", data=inputs / "pairs.jsonl", **given)


@pytest.fixture(scope="module")
def trained(inputs):
    return run_reward(configure(inputs), RunOptions(inputs / "trained"))


def test_the_preference_is_learned(trained):
    assert trained.summary["accuracy"] > 0.9 and trained.summary["loss"] < 0.4
    assert trained.summary["margin"] > 1


def test_the_output_is_a_reward_model_with_one_output(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained.out)
    assert model.config.num_labels == 1 and model.config.architectures == ["Gemma2ForSequenceClassification"]
    assert RewardModel.from_dir(trained.out).score([[2, 5]], [[6]]).shape == (1,)


@pytest.fixture(scope="module")
def conversations(inputs):
    chat = ChatFormat(tiny_tokenizer())
    pairs, _ = tokenise_pairs(read_pairs(inputs / "pairs.jsonl")[:10], chat, 1024, plain_reading())
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def test_scores_do_not_depend_on_batch_size_order_or_padding_side(trained, conversations):
    model = RewardModel.from_dir(trained.out)
    one_by_one = model.score(conversations, [[]] * 20, batch_size=1)
    torch.testing.assert_close(model.score(conversations, [[]] * 20, batch_size=7), one_by_one, atol=1e-5, rtol=0)
    turned = model.score(conversations[::-1], [[]] * 20, batch_size=7).flip(0)
    torch.testing.assert_close(turned, one_by_one, atol=1e-5, rtol=0)
    plain = AutoModelForSequenceClassification.from_pretrained(trained.out, attn_implementation="eager")
    tokenizer = tiny_tokenizer()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": conversations}, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(plain(**batch).logits.squeeze(-1), one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("after", "lora"), [(8, 4), pytest.param(5, 0, marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_to_the_same_bytes(inputs, tmp_path, trained, after, lora, interrupting):
    config = configure(inputs, lora_rank=lora)
    whole = run_reward(config, RunOptions(tmp_path / "whole")).out if lora else trained.out
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_reward(config, RunOptions(out), interrupting(after))
    resumed = run_reward(config, RunOptions(out, resume=True))
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert resumed.summary == json.loads((whole / "gemma2.json").read_text())["summary"]


def test_lora_trains_products_and_head_and_writes_a_plain_model(inputs, tmp_path):
    out = run_reward(configure(inputs, lora_rank=2, max_steps=1), RunOptions(tmp_path / "out")).out
    untrained, _ = init_reward_model(inputs / "model", 0)
    # One step of Adam moves every weight of the head by the learning rate.
    moved = load_file(out / "model.safetensors")["score.weight"] - untrained.score.weight.detach()
    assert moved.abs().min() > 5e-3
    before, after = load_file(inputs / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    assert after.keys() == before.keys() | {"score.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}


def test_the_head_follows_from_the_seed(inputs, tmp_path):
    def head(name, **fields):
        config = configure(inputs, max_steps=1, learning_rate=1e-12, **fields)
        return load_file(run_reward(config, RunOptions(tmp_path / name)).out / "model.safetensors")["score.weight"]

    first, again, other = head("a"), head("b"), head("c", seed=1)
    torch.testing.assert_close(first, again)
    assert (first - other).abs().max() > 1e-3


def test_trl_s_options_are_checked_by_name(inputs, tmp_path):
    trainer = {"center_rewards_coeficient": 0.1}
    with pytest.raises(UsageError, match="did you mean 'center_rewards_coefficient'"):
        run_reward(configure(inputs, trainer=trainer), RunOptions(tmp_path / "out"))


# -- pairs to ids ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


def tokenised(tmp_path, chat, *rows, max_length=1024):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return tokenise_pairs(read_pairs(tmp_path / "rows.jsonl"), chat, max_length, plain_reading())


def test_a_completion_ends_with_its_end_of_turn_and_a_truncated_one_does_not(tmp_path, chat):
    (pair,), _ = tokenised(
        tmp_path, chat, {"prompt": "a", "chosen": "b", "rejected": "b c", "rejected_truncated": True}
    )
    prompt = "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n"
    assert chat.tokenizer.decode(pair.chosen) == prompt + "b<end_of_turn>"
    assert chat.tokenizer.decode(pair.rejected) == prompt + "b c"
    assert pair.prompt == len(chat.prompt_ids([{"role": "user", "content": "a"}]))


def test_truncation_alone_makes_a_pair_and_equality_does_not(tmp_path, chat):
    same = {"prompt": "a", "chosen": "b", "rejected": " b "}
    pairs, dropped = tokenised(tmp_path, chat, same, same | {"rejected_truncated": True})
    assert len(pairs) == 1 and dropped == {"overlong_dropped": 0, "identical_dropped": 1}


def test_overlong_pairs_are_dropped_and_counted(tmp_path, chat):
    short, long = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b" * 40, "rejected": "c"}
    pairs, dropped = tokenised(tmp_path, chat, short, long, max_length=30)
    assert len(pairs) == 1 and dropped == {"overlong_dropped": 1, "identical_dropped": 0}
    with pytest.raises(
        InputError, match="none of 1 pairs is usable: 1 over --max-length 30, 0 with two identical sides"
    ):
        tokenised(tmp_path, chat, long, max_length=30)


def test_dropped_pairs_are_reported(inputs, tmp_path, interrupting):
    progress = interrupting(10**9)
    run_reward(configure(inputs, max_length=32, max_steps=1), RunOptions(tmp_path / "out"), progress)
    assert "pairs are longer than --max-length 32 and were dropped" in progress.warnings[0]


@pytest.fixture
def uneven(inputs, tmp_path):
    """Pairs of which exactly the held-out ones are too long for 100 tokens."""
    _, heldout = split(read_pairs(inputs / "pairs.jsonl"), 0.2, 0)
    keys = {pair.prompt[0]["content"] for pair in heldout}
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    long = [row | {"chosen": "x" * 300} if row["prompt"] in keys else row for row in rows]
    (tmp_path / "uneven.jsonl").write_bytes(b"".join(map(to_line, long)))
    return tmp_path / "uneven.jsonl", len(heldout)


@pytest.mark.parametrize("command", ["reward", "probe"])
def test_held_out_pairs_that_are_too_long_are_reported_and_training_continues(
    inputs, tmp_path, uneven, command, interrupting
):
    data, count = uneven
    progress = interrupting(10**9)
    if command == "reward":
        config = configure(inputs, max_length=100, max_steps=1).model_copy(update={"data": data})
        result = run_reward(config, RunOptions(tmp_path / "out"), progress)
    else:
        probe = ProbeConfig(model=inputs / "model", data=data, max_length=100, eval_fraction=0.2)
        result = run_probe(probe, RunOptions(tmp_path / "out"), progress)
    assert result.summary["overlong_dropped"] == count and result.summary["heldout_pairs"] == 0
    assert f"{count} of 60 pairs are longer than --max-length 100" in progress.warnings[0]
    assert f"none of the {count} held-out pairs is usable" in progress.warnings[1]


def test_held_out_scores_that_are_not_finite_stop_the_run(conversations):
    model = random_reward_model()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    pair = PairIds(conversations[0], conversations[10], 4)
    with pytest.raises(GuardStop, match=r"a score that is NaN or infinite; lower --learning-rate"):
        measure(RewardModel(model, tiny_tokenizer()), [pair], 2)


def test_held_out_pairs_are_read_in_batches_of_the_training_size(inputs, tmp_path, monkeypatch):
    seen, score = set(), RewardModel.score
    monkeypatch.setattr(RewardModel, "score", lambda self, *rows: seen.add(rows[2]) or score(self, *rows))
    run_reward(configure(inputs, micro_batch_size=3, max_steps=1), RunOptions(tmp_path / "out"))
    assert seen == {3}


def test_held_out_figures_during_training_need_held_out_pairs(inputs):
    with pytest.raises(ValueError, match="eval_fraction is 0"):
        configure(inputs, eval_every=2, eval_fraction=0)


def test_an_adapter_on_the_head_is_refused(inputs, tmp_path):
    config = configure(inputs, lora_rank=2, lora_targets=("score",), max_steps=1)
    with pytest.raises(UsageError, match="--lora-targets: no linear layer is named 'score'"):
        run_reward(config, RunOptions(tmp_path / "out"))


@pytest.mark.parametrize("margins", [(None, None), (1.5, None)])
def test_the_loss_is_bradley_terry_less_the_margin(inputs, tmp_path, margins):
    class Folder:
        checkpoints = tmp_path

    model = random_reward_model()
    ids = [([2, 9, 10], [2, 9, 11, 12]), ([2, 9, 13], [2, 9, 14])]
    pairs = [PairIds(chosen, rejected, 2, margin) for (chosen, rejected), margin in zip(ids, margins, strict=True)]
    trainer = make_trainer(model, tiny_tokenizer(), pairs, configure(inputs), Folder())
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch).item()
    rewards = [[model(torch.tensor([side])).logits.item() for side in pair] for pair in ids]
    expected = [math.log1p(math.exp(-(c - r - (m or 0.0)))) for (c, r), m in zip(rewards, margins, strict=True)]
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_held_out_figures_come_every_few_steps_and_the_best_weights_can_be_kept(inputs, tmp_path):
    config = configure(inputs, eval_every=2, keep="best", learning_rate=0.05, max_steps=8)
    result = run_reward(config, RunOptions(tmp_path / "out"))
    rows = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    assert list(losses) == [0, 2, 4, 6, 8]
    assert all("heldout_accuracy" in row for row in rows if "heldout_loss" in row)
    best = min((2, 4, 6, 8), key=losses.__getitem__)
    assert result.summary["best_step"] == best
    # The weights that were written are those: measured again, they give the lowest loss.
    assert result.summary["loss"] == pytest.approx(losses[best], rel=1e-5)


def test_dropout_and_accumulation_resume_to_the_same_bytes(inputs, tmp_path, interrupting):
    fields = {"dropout": 0.2, "micro_batch_size": 4, "max_steps": 7, "eval_every": 2, "center_coefficient": 0.01}
    config = configure(inputs, **fields)
    whole = run_reward(config, RunOptions(tmp_path / "whole")).out
    with pytest.raises(KeyboardInterrupt):
        run_reward(config, RunOptions(tmp_path / "out"), interrupting(4))
    run_reward(config, RunOptions(tmp_path / "out", resume=True))
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_eight_micro_batches_of_one_give_the_result_of_one_batch_of_eight(inputs, tmp_path):
    weights = {}
    for micro in (1, 8):
        out = tmp_path / str(micro)
        code, _, err = gemma2(
            *("reward", "--model", inputs / "model", "--data", inputs / "pairs.jsonl", "--out", out, "--quiet"),
            *("--batch-size", 8, "--micro-batch-size", micro, "--learning-rate", 1e-3, "--max-steps", 6),
        )
        assert code == 0, err
        weights[micro] = load_file(out / "model.safetensors")
    before = load_file(inputs / "model" / "model.safetensors")
    for name, value in weights[8].items():
        # Adam takes steps of lr / sqrt(v), so a difference is measured relative to the distance from the start.
        moved = (value - before[name]).norm() if name in before else value.norm()
        assert (weights[1][name] - value).norm() < 2e-2 * moved, name


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(inputs, tmp_path):
    command = (
        *("reward", "--model", inputs / "model", "--data", inputs / "pairs.jsonl", "--quiet", "--dropout", 0.1),
        *("--save-every", 5, "--max-steps", 60, "--epochs", 50, "--eval-every", 7, "--keep", "best"),
    )
    assert gemma2(*command, "--out", tmp_path / "whole")[0] == 0
    process = start(MAIN, *command, "--out", tmp_path / "out")
    checkpoints = tmp_path / ".out.partial" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("checkpoint-*/complete.json")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    code, _, err = gemma2(*command, "--out", tmp_path / "out", "--resume")
    assert code == 0, err
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
