"""SFT: what is learned, overlong rows, LoRA, invariance to micro-batches, a resume that ends with the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from processes import MAIN, start
from row_reading import plain_reading, read_conversations
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from waiting import wait_for

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.merging.inputs.adapter import open_adapter
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import Cut
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.sft import sft
from gemma2.posttrain.sft.sft import Example, heldout_loss, run_sft, tokenise
from gemma2.posttrain.sft.sft_trainer import make_trainer
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer

pytestmark = pytest.mark.long


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
    given = {"learning_rate": 3e-3, "batch_size": 8, "eval_fraction": 0.1, "save_every": 3}
    return SftConfig(**({"model": inputs / "model", "data": inputs / "data.jsonl"} | given | fields))


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
    assert lines[-2] == {"step": trained.summary["steps"], "heldout_loss": trained.summary["heldout_loss"]}
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == list(range(1, trained.summary["steps"] + 1))


@pytest.mark.parametrize(
    ("after", "lora"), [(7, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 0), (8, 0), (7, 4)))]
)
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


def test_a_run_killed_while_its_result_is_written_takes_no_further_step(inputs, tmp_path, monkeypatch):
    """Three steps are not a whole number of epochs: the trainer would continue with the fourth."""
    config = configure(inputs, max_steps=3, trainer={"lr_scheduler_type": "constant"})
    whole = run_sft(config, RunOptions(tmp_path / "whole"))

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "write_model", killed)
        run_sft(config, RunOptions(tmp_path / "out"))
    resumed = run_sft(config, RunOptions(tmp_path / "out", resume=True))
    assert resumed.summary == whole.summary and resumed.summary["steps"] == 3
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole.out / name).read_bytes()


def test_best_weights_without_rows_to_compare_them_on_are_refused(inputs, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text((inputs / "data.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(UsageError, match="no rows are held out"):
        run_sft(configure(inputs, data=one, eval_every=2, keep="best"), RunOptions(tmp_path / "out"))


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub", "completion_only_loss", "train_sampling_strategy"])
def test_options_of_trl_without_effect_or_with_a_secret_are_refused(inputs, tmp_path, name):
    with pytest.raises(UsageError, match=rf"trainer\.{name}"):
        run_sft(configure(inputs, trainer={name: "x"}), RunOptions(tmp_path / "out"))


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


@pytest.mark.parametrize("option", [{"neftune_noise_alpha": 5}, {"label_smoothing_factor": 0.2}, {"loss_type": "dft"}])
def test_options_that_change_the_loss_change_the_result(inputs, tmp_path, option):
    plain, other = (
        run_sft(configure(inputs, max_steps=1, trainer=given), RunOptions(tmp_path / name)).out
        for name, given in (("plain", {}), ("other", option))
    )
    assert (plain / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


# -- adapters ------------------------------------------------------------------------------------------------------


def test_an_adapter_merged_with_its_base_is_the_merged_model(inputs, tmp_path):
    config = configure(inputs, lora_rank=4, lora_alpha=8, max_steps=2)
    merged = run_sft(config, RunOptions(tmp_path / "merged")).out
    out = run_sft(config.model_copy(update={"lora_output": "adapter"}), RunOptions(tmp_path / "adapter")).out
    assert not (out / "config.json").exists() and not (out / "README.md").exists()
    adapter = open_adapter(out, "--model")
    base, expected = (load_file(path / "model.safetensors") for path in (inputs / "model", merged))
    factors = load_file(out / "adapter_model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], expected[name])}
    assert changed == set(adapter.updates)
    for name, update in adapter.updates.items():
        product = update.scale * factors[update.b.name] @ factors[update.a.name]
        torch.testing.assert_close(base[name] + product, expected[name])


def test_an_adapter_as_the_model_is_refused_with_the_way_to_merge_it(inputs, tmp_path):
    config = configure(inputs, lora_rank=4, max_steps=1, lora_output="adapter")
    out = run_sft(config, RunOptions(tmp_path / "adapter")).out
    with pytest.raises(InputError, match=r"adapter is a LoRA adapter, not a model; .* gemma2 merge linear"):
        run_sft(config.model_copy(update={"model": out}), RunOptions(tmp_path / "out"))


def test_the_adapter_has_the_requested_targets_and_dropout(inputs, tmp_path):
    config = configure(inputs, lora_rank=4, max_steps=2, lora_targets=("q_proj", "v_proj"))
    plain = run_sft(config, RunOptions(tmp_path / "plain")).out
    before, after = (load_file(path / "model.safetensors") for path in (inputs / "model", plain))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj"}
    dropped = run_sft(config.model_copy(update={"lora_dropout": 0.5}), RunOptions(tmp_path / "dropped")).out
    assert (dropped / "model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()
    wrong = config.model_copy(update={"lora_targets": ("q_porj",)})
    with pytest.raises(UsageError, match="no linear layer is named 'q_porj'; did you mean 'q_proj'"):
        run_sft(wrong, RunOptions(tmp_path / "wrong"))


# -- mixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(inputs, tmp_path):
    rows = [{"prompt": f"Name {i}", "completion": f"n{i}"} for i in range(10)]
    (tmp_path / "names.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return (inputs / "data.jsonl", tmp_path / "names.jsonl")


def test_a_mixture_counts_its_rows_by_source(inputs, tmp_path, mixed):
    config = configure(inputs, data=mixed, weights=(1, 3), eval_fraction=0)
    summary = run_sft(config, RunOptions(tmp_path / "out")).summary
    sums, names = map(str, mixed)
    assert summary["rows_by_source"] == {sums: 40, names: 10}
    assert summary["rows_per_epoch"] == {sums: 13, names: 37}  # of 50: 12.5 and 37.5, the first gets the row left over
    assert summary["steps"] == -(-50 // 8)


def test_weights_change_the_result_and_a_resume_keeps_it(inputs, tmp_path, mixed, interrupting):
    def made(name, **fields):
        config = configure(inputs, data=mixed, epochs=2, **fields)
        return run_sft(config, RunOptions(tmp_path / name)).out

    even, heavy = made("even"), made("heavy", weights=(1, 3))
    assert (even / "model.safetensors").read_bytes() != (heavy / "model.safetensors").read_bytes()
    config = configure(inputs, data=mixed, epochs=2, weights=(1, 3))
    with pytest.raises(KeyboardInterrupt):
        run_sft(config, RunOptions(tmp_path / "out"), interrupting(8))
    run_sft(config, RunOptions(tmp_path / "out", resume=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (heavy / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weights": (1, 2)}, "2 weights for 1 data sets"),
        ({"weights": (-1,)}, "weights must be above 0"),
        ({"data": ("a", "a")}, "data names a twice"),
        ({"lora_output": "adapter"}, "lora_output=adapter needs an adapter"),
        ({"packing": True, "attention": "eager"}, "packing needs flex or flash attention"),
    ],
)
def test_options_that_do_not_fit_are_refused(inputs, fields, said):
    with pytest.raises(ValueError, match=said):
        configure(inputs, **fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_attention_that_cannot_run_here_is_refused_before_anything_is_written(inputs, tmp_path):
    for name in ("flex_attention", "flash_attention_2", "flash_attention_3"):
        with pytest.raises(UsageError, match=f"--attention {name} needs an accelerator, and none was found; use"):
            run_sft(configure(inputs, attention=name), RunOptions(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# -- through the command line --------------------------------------------------------------------------------------


def cli(*words):
    """Run one command line in this process. Returns its exit code."""
    return invoke([str(word) for word in words])


def flags(inputs, out, **more):
    given = {"model": inputs / "model", "data": inputs / "data.jsonl", "out": out, "learning-rate": "3e-3"} | more
    return ["sft", *(word for name, value in given.items() for word in (f"--{name}", value)), "--quiet", "--json"]


def test_eight_times_one_row_are_one_batch_of_eight(inputs, tmp_path, capsys):
    """Rows of unequal length: a mean of the means of micro-batches would give other weights."""
    for name, more in (("eights", {}), ("ones", {"micro-batch-size": 1}), ("parts", {"micro-batch-tokens": 60})):
        assert cli(*flags(inputs, tmp_path / name, **{"batch-size": 8, "max-steps": 4} | more)) == 0
    expected, *others = (load_file(tmp_path / n / "model.safetensors") for n in ("eights", "ones", "parts"))
    start = load_file(inputs / "model" / "model.safetensors")
    moved = max((expected[name] - start[name]).abs().max() for name in start)
    for other in others:
        for name in expected:
            assert (expected[name] - other[name]).abs().max() < 1e-3 * moved


def test_show_tokens_writes_nothing_and_marks_what_is_learned(inputs, tmp_path, capsys):
    assert cli("sft", "--model", inputs / "model", "--data", inputs / "data.jsonl", "--show-tokens", 2) == 0
    out = capsys.readouterr().out
    first, _ = out.split("\n\n")
    assert first.startswith(f'{inputs / "data.jsonl"}:1: 24 tokens, 7 learned\n    0       2  -      "<bos>"\n')
    assert first.endswith('23       1  learn  "<eos>"') and "\x1b" not in out
    assert cli("sft", "--model", inputs / "model", "--data", inputs / "data.jsonl", "--show-tokens", 1, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert [token["text"] for token in row["tokens"] if token["target"]][-2:] == ["<end_of_turn>", "<eos>"]
    assert row["kept"] == len(row["tokens"]) == 24


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"lora-rank": 4, "lora-dropout": 0.1}])
def test_a_killed_run_resumes_to_the_same_bytes(inputs, tmp_path, extra):
    more = {"epochs": 12, "batch-size": 8, "save-every": 3, "eval-every": 2, "keep": "best", "patience": 50} | extra
    assert cli(*flags(inputs, tmp_path / "whole", **more)) == 0
    process = start(MAIN, *flags(inputs, tmp_path / "out", **more))
    checkpoints = tmp_path / ".out.partial" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("checkpoint-*/complete.json")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert cli(*flags(inputs, tmp_path / "out", **more), "--resume") == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# -- rows to examples ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


def examples(tmp_path, chat, *rows, **fields):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(to_line, rows)))
    config = SftConfig(model=tmp_path, data=tmp_path / "rows.jsonl", **fields)
    return tokenise(read_conversations(config.data[0]), chat, config, plain_reading())


def learned(chat, example):
    return chat.tokenizer.decode([i for i, target in zip(example.ids, example.mask, strict=True) if target])


def golden(chat, *pieces):
    """An example from its tokens, written out by hand; a star marks what is learned, \u2581 is a blank."""
    vocabulary = chat.tokenizer.get_vocab()
    return Example([vocabulary[piece.removesuffix("*")] for piece in pieces], [p.endswith("*") for p in pieces])


USER = ("<start_of_turn>", "user", "\n")
MODEL = ("<end_of_turn>", "\n", "<start_of_turn>", "model", "\n")
END = ("<end_of_turn>*", "<eos>*")


def test_golden_one_turn(tmp_path, chat):
    (found,), _ = examples(tmp_path, chat, {"prompt": "7 plus 1", "completion": "8"})
    assert found == golden(chat, "<bos>", *USER, "7", "▁plus", "▁", "1", *MODEL, "8*", *END)


def test_golden_several_turns(tmp_path, chat):
    row = {"messages": [user("7"), model("8"), user("9?"), model("1")]}
    (found,), _ = examples(tmp_path, chat, row)
    first = ("<bos>", *USER, "7", *MODEL, "8*", "<end_of_turn>*", "\n")
    assert found == golden(chat, *first, *USER, "9", "?", *MODEL, "1*", *END)


def test_golden_system_text(tmp_path, chat):
    row = {"messages": [{"role": "system", "content": "9"}, user("7"), model("8")]}
    (found,), _ = examples(tmp_path, chat, row)
    assert found == golden(chat, "<bos>", *USER, "9", "\n", "\n", "7", *MODEL, "8*", *END)


def test_golden_control_tokens_in_user_text(tmp_path, chat):
    (found,), _ = examples(tmp_path, chat, {"prompt": "<bos>", "completion": "8"})
    assert found == golden(chat, "<bos>", *USER, "<", "bo", "s", ">", *MODEL, "8*", *END)


def test_golden_truncated_by_its_teacher(tmp_path, chat):
    (found,), _ = examples(tmp_path, chat, {"prompt": "7 plus 1", "completion": "8", "finish_reason": "length"})
    assert found == golden(chat, "<bos>", *USER, "7", "▁plus", "▁", "1", *MODEL, "8*")


def test_golden_truncated_at_the_limit(tmp_path, chat):
    """Two model turns: the first is learned with its end, of the second what is left, without one."""
    row = {"messages": [user("7"), model("8"), user("9?"), model("1 2 3")]}
    (found,), overlong = examples(tmp_path, chat, row, max_length=24, on_overlong="truncate")
    first = ("<bos>", *USER, "7", *MODEL, "8*", "<end_of_turn>*", "\n")
    assert found == golden(chat, *first, *USER, "9", "?", *MODEL, "1*")
    assert overlong.rows == (Cut(f"{tmp_path / 'rows.jsonl'}:1", 30, 24),)


def test_overlong_rows_are_listed_one_by_one(inputs, tmp_path):
    out = run_sft(configure(inputs, max_steps=1, max_length=36), RunOptions(tmp_path / "out")).out
    listed = [json.loads(line) for line in (out / "overlong.jsonl").read_text().splitlines()]
    summary = json.loads((out / "gemma2.json").read_text())["summary"]
    assert len(listed) >= summary["overlong_dropped"] > 0
    assert all(row["action"] == "dropped" and row["tokens"] > 36 and row["kept"] == 0 for row in listed)
    assert listed[0]["where"].startswith(f"{inputs / 'data.jsonl'}:")


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


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
