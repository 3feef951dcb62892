"""SFT: what is learned, overlong rows, LoRA, invariance to micro-batches, a resume that ends with the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma2.merging.errors import InputError, UsageError
from gemma2.posttrain.chat import ChatFormat
from gemma2.posttrain.data import read_conversations
from gemma2.posttrain.rundir import RunOptions
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.sft import Example, heldout_loss, run_sft, tokenise
from gemma2.posttrain.sft_trainer import make_trainer
from gemma2.posttrain.sources import to_line
from gemma2.posttrain.tiny import random_model, save_random, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    rows = [
        {"prompt": f"What is {i} plus {i}?" + " please" * (i % 5), "completion": f"It is {2 * i}."} for i in range(40)
    ]
    (folder / "data.jsonl").write_bytes(b"".join(map(to_line, rows)))
    save_random(folder / "model")
    return folder


def configure(inputs, **fields):
    given = {"learning_rate": 3e-3, "batch_size": 8, "eval_fraction": 0.1, "save_every": 3, **fields}
    return SftConfig(model=inputs / "model", data=inputs / "data.jsonl", **given)


@pytest.fixture(scope="module")
def trained(inputs):
    """An uninterrupted run over two epochs."""
    return run_sft(configure(inputs, epochs=2), RunOptions(inputs / "trained"))


def test_training_lowers_the_held_out_loss(trained):
    assert trained.summary["heldout_loss"] < trained.summary["heldout_loss_before"] - 0.3


def test_the_output_is_a_model_that_transformers_loads(trained):
    model = AutoModelForCausalLM.from_pretrained(trained.out)
    assert model.generation_config.eos_token_id == [1, 107]
    assert AutoTokenizer.from_pretrained(trained.out).chat_template
    manifest = json.loads((trained.out / "gemma2.json").read_text())
    assert manifest["status"] == "complete" and manifest["summary"] == trained.summary
    assert not (trained.out / "checkpoints").exists()


def test_metrics_begin_and_end_with_the_held_out_loss(trained):
    lines = [json.loads(line) for line in (trained.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "heldout_loss": trained.summary["heldout_loss_before"]}
    assert lines[-1] == {"step": trained.summary["steps"], "heldout_loss": trained.summary["heldout_loss"]}
    assert [line["step"] for line in lines[1:-1]] == list(range(1, trained.summary["steps"] + 1))


@pytest.mark.parametrize(("after", "lora"), [(4, 0), (7, 0), (8, 0), (7, 4)])
def test_an_interrupted_run_resumes_to_the_same_bytes(inputs, tmp_path, trained, after, lora, interrupting):
    config = configure(inputs, epochs=2, lora_rank=lora)
    whole = run_sft(config, RunOptions(tmp_path / "whole")).out if lora else trained.out
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_sft(config, RunOptions(out), interrupting(after))
    assert not out.exists()
    resumed = run_sft(config, RunOptions(out, resume=True))
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert resumed.summary == json.loads((whole / "gemma2.json").read_text())["summary"]


def test_micro_batches_do_not_change_the_result(inputs, tmp_path, trained):
    run_sft(configure(inputs, epochs=2, micro_batch_size=1), RunOptions(tmp_path / "out"))
    ones, eights = (load_file(path / "model.safetensors") for path in (tmp_path / "out", trained.out))
    for name in eights:
        torch.testing.assert_close(ones[name], eights[name], atol=2e-4, rtol=0)


def test_a_batch_that_micro_batches_do_not_divide_is_refused(inputs, tmp_path):
    with pytest.raises(UsageError, match="not a multiple of --micro-batch-size 3"):
        run_sft(configure(inputs, micro_batch_size=3), RunOptions(tmp_path / "out"))


def test_lora_changes_the_adapted_weights_only_and_writes_a_plain_model(inputs, tmp_path):
    run_sft(configure(inputs, lora_rank=4, max_steps=2), RunOptions(tmp_path / "out"))
    before, after = (load_file(path / "model.safetensors") for path in (inputs / "model", tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}


def test_trainer_options_reach_trl_and_are_checked(inputs, tmp_path):
    frozen = run_sft(configure(inputs, max_steps=1, trainer={"weight_decay": 0.5}), RunOptions(tmp_path / "a")).out
    plain = run_sft(configure(inputs, max_steps=1), RunOptions(tmp_path / "b")).out
    assert (frozen / "model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"trainer\.weight_decy'; did you mean 'weight_decay'"):
        run_sft(configure(inputs, trainer={"weight_decy": 0.5}), RunOptions(tmp_path / "c"))
    assert not list(tmp_path.glob(".c*"))


def test_overlong_rows_are_counted_and_reported(inputs, tmp_path, trained, interrupting):
    progress = interrupting()
    summary = run_sft(configure(inputs, max_steps=1, max_length=36), RunOptions(tmp_path / "out"), progress).summary
    dropped, total = summary["overlong_dropped"], trained.summary["rows"]
    assert 0 < dropped == total - summary["rows"]
    first = f"{dropped} of {total} rows are longer than --max-length 36 and were dropped ({inputs / 'data.jsonl'}:"
    assert progress.warnings[0].startswith(first)


# -- rows to examples ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


def examples(tmp_path, chat, *rows, **fields):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(to_line, rows)))
    config = SftConfig(model=tmp_path, data=tmp_path / "rows.jsonl", **fields)
    return tokenise(read_conversations(config.data[0]), chat, config)


def learned(chat, example):
    return chat.tokenizer.decode([i for i, target in zip(example.ids, example.mask, strict=True) if target])


TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "b"},
]


def test_messages_are_learned_in_every_model_turn_a_completion_in_its_own_only(tmp_path, chat):
    (every, own), _ = examples(
        tmp_path,
        chat,
        {"messages": [*TURNS, {"role": "assistant", "content": "2"}]},
        {"prompt": TURNS, "completion": "2"},
    )
    assert learned(chat, every) == "1<end_of_turn>2<end_of_turn><eos>"
    assert learned(chat, own) == "2<end_of_turn><eos>"
    assert every.ids == own.ids


def test_the_end_of_a_truncated_completion_is_not_learned(tmp_path, chat):
    (example,), _ = examples(tmp_path, chat, {"prompt": "a", "completion": "2", "finish_reason": "length"})
    assert learned(chat, example) == "2"


def test_the_last_target_follows_the_option(tmp_path, chat):
    (example,), _ = examples(tmp_path, chat, {"prompt": "a", "completion": "2"}, end_of_turn="eot")
    assert learned(chat, example) == "2<end_of_turn>"


LONG = {"prompt": "a", "completion": "1 2 3 4 5 6 7 8 9"}
SHORT = {"prompt": "a", "completion": "1"}


def test_overlong_rows_are_dropped_cut_or_refused(tmp_path, chat):
    (whole,), _ = examples(tmp_path, chat, LONG)
    limit = len(whole.ids) - 3
    kept, counts = examples(tmp_path, chat, LONG, SHORT, max_length=limit)
    assert [learned(chat, e) for e in kept] == ["1<end_of_turn><eos>"] and (counts.dropped, counts.truncated) == (1, 0)
    cut, counts = examples(tmp_path, chat, LONG, SHORT, max_length=limit, on_overlong="truncate")
    assert cut[0] == Example(whole.ids[:limit], whole.mask[:limit]) and (counts.dropped, counts.truncated) == (0, 1)
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: {len(whole.ids)} tokens, more than --max-length {limit}"):
        examples(tmp_path, chat, LONG, max_length=limit, on_overlong="error")


def test_a_row_cut_before_its_first_target_is_dropped(tmp_path, chat):
    long_prompt = {"prompt": "1 2 3 4 5 6 7 8 9", "completion": "1"}
    kept, counts = examples(tmp_path, chat, long_prompt, SHORT, max_length=18, on_overlong="truncate")
    assert len(kept) == 1 and (counts.dropped, counts.truncated) == (1, 0)


def test_data_without_a_row_that_fits_is_refused(tmp_path, chat):
    with pytest.raises(InputError, match="all 1 rows are longer than --max-length 8"):
        examples(tmp_path, chat, SHORT, max_length=8)


def test_a_row_that_the_template_refuses_is_named(tmp_path, chat):
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the chat template refuses the turns user, user"):
        examples(tmp_path, chat, SHORT, {"messages": [TURNS[0], TURNS[0], TURNS[1]]})


@torch.no_grad()
def masked_loss(model, rows):
    """Mean of -log pi over the targets of all rows, each row alone and without padding."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
        nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row.ids[1:]), reduction="none")
        losses += nll[torch.tensor(row.mask[1:])].tolist()
    return sum(losses) / len(losses)


ROWS = [LONG, SHORT, {"messages": [*TURNS, {"role": "assistant", "content": "2"}]}]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_held_out_loss_is_the_mean_over_target_tokens(tmp_path, chat, batch_size):
    rows, _ = examples(tmp_path, chat, *ROWS)
    assert heldout_loss(random_model(), rows, batch_size) == pytest.approx(masked_loss(random_model(), rows), rel=1e-5)


def test_the_training_loss_is_the_mean_over_target_tokens_of_the_batch(inputs, tmp_path, chat):
    class Folder:
        checkpoints = tmp_path

    rows, _ = examples(tmp_path, chat, *ROWS)
    model = random_model()
    trainer = make_trainer(model, tiny_tokenizer(), rows, configure(inputs), Folder(), accumulation=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(masked_loss(random_model(), rows), rel=1e-5)
