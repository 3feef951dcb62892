"""The held-out loss during training: when it is measured, which weights are kept, when it stops, all under resume."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.sft.sft import run_sft
from gemma2.posttrain.tiny.networks import save_random
from gemma2.posttrain.training.heldout import heldout_loss


def write(path, rows):
    path.write_bytes(b"".join(map(to_line, rows)))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Training rows say 1, held-out ones 2: both end alike, which is learned first and helps; the 1 then harms."""
    folder = tmp_path_factory.mktemp("heldout")
    write(folder / "data.jsonl", [{"prompt": f"{i}?" + " x" * (i % 4), "completion": "1"} for i in range(8)])
    write(folder / "held.jsonl", [{"prompt": f"{i}!", "completion": "2"} for i in range(10, 16)])
    write(folder / "far.jsonl", [{"prompt": f"{i}!", "completion": "2 3 4 5 6 7 8 9"} for i in range(10, 16)])
    save_random(folder / "model")
    return folder


def configure(inputs, **fields):
    given = {"learning_rate": 3e-2, "batch_size": 4, "epochs": 8, "save_every": 5, "eval_every": 2} | fields
    data = inputs / "data.jsonl"
    return SftConfig(model=inputs / "model", data=data, eval_data=inputs / "held.jsonl", **given)


def metrics(out, name="heldout_loss"):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def overfitted(inputs):
    """16 steps; the held-out loss falls, then rises."""
    return run_sft(configure(inputs, keep="best"), RunOptions(inputs / "overfitted"))


def test_the_loss_is_measured_at_the_start_every_few_steps_and_at_the_end(inputs, overfitted, tmp_path):
    assert list(metrics(overfitted.out)) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    uneven = run_sft(configure(inputs, eval_every=3, max_steps=5), RunOptions(tmp_path / "out"))
    assert list(metrics(uneven.out)) == [0, 3, 5]
    assert uneven.summary["heldout_loss"] == metrics(uneven.out)[5]


def test_the_weights_with_the_lowest_loss_become_the_output(inputs, overfitted):
    losses = metrics(overfitted.out)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert 0 < best < 16, "the data are made for it"
    assert overfitted.summary["best_step"] == best
    assert overfitted.summary["heldout_loss"] == losses[best] < losses[16]


def test_keep_last_outputs_the_last_weights(inputs, overfitted, tmp_path):
    last = run_sft(configure(inputs), RunOptions(tmp_path / "out"))
    assert last.summary["heldout_loss"] == metrics(overfitted.out)[16] and "best_step" not in last.summary
    ours, best = (load_file(path / "model.safetensors") for path in (last.out, overfitted.out))
    assert any(not ours[name].equal(best[name]) for name in ours)


def test_training_stops_after_patience_losses_without_a_lower_one(inputs, overfitted, tmp_path):
    best = overfitted.summary["best_step"]
    stopped = run_sft(configure(inputs, keep="best", patience=2), RunOptions(tmp_path / "out"))
    losses = metrics(stopped.out)
    assert stopped.summary["steps"] == max(losses) < 16
    assert [losses[step] > losses[max(losses) - 4] for step in sorted(losses)[-2:]] == [True, True]
    assert stopped.summary["best_step"] == max(losses) - 4 <= best


@pytest.mark.parametrize(
    ("after", "lora"),
    [(6, 0), (11, 4), *(pytest.param(a, r, marks=pytest.mark.slow) for a in (9, 12, 15) for r in (0, 4))],
)
def test_an_interrupted_run_finds_the_same_best_weights_and_stops_at_the_same_step(
    inputs, tmp_path, interrupting, after, lora
):
    config = configure(inputs, keep="best", patience=4, lora_rank=lora)
    whole = inputs / f"whole-{lora}"
    if not whole.exists():
        run_sft(config, RunOptions(whole))
    out = tmp_path / "out"
    steps = json.loads((whole / "gemma2.json").read_text())["summary"]["steps"]
    with pytest.raises(KeyboardInterrupt):
        run_sft(config, RunOptions(out), interrupting(min(after, steps - 1)))
    resumed = run_sft(config, RunOptions(out, resume=True))
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert resumed.summary == json.loads((whole / "gemma2.json").read_text())["summary"]
    assert not list(out.glob("**/best*"))


def test_a_rising_loss_is_warned_of(inputs, tmp_path, interrupting):
    progress = interrupting()
    config = configure(inputs, learning_rate=0.1).model_copy(update={"eval_data": inputs / "far.jsonl"})
    run_sft(config, RunOptions(tmp_path / "out"), progress)
    assert any(warning.startswith("the held-out loss rose from") for warning in progress.warnings)


def test_prompts_on_both_sides_are_warned_of(inputs, tmp_path, interrupting):
    progress = interrupting()
    config = configure(inputs, max_steps=1).model_copy(update={"eval_data": inputs / "data.jsonl"})
    run_sft(config, RunOptions(tmp_path / "out"), progress)
    assert any("8 of 8 prompts of" in warning for warning in progress.warnings)


def test_the_loss_of_the_output_is_the_one_that_was_reported(inputs, overfitted):
    from row_reading import plain_reading, read_conversations

    from gemma2.posttrain.data.chat import ChatFormat
    from gemma2.posttrain.data.examples import tokenise

    model, tokenizer = load_policy(overfitted.out)
    rows, _ = tokenise(
        read_conversations(inputs / "held.jsonl"), ChatFormat(tokenizer), configure(inputs), plain_reading()
    )
    assert heldout_loss(model, rows, 4) == pytest.approx(overfitted.summary["heldout_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": "best", "eval_every": None}, "compare held-out losses; give eval_every"),
        ({"patience": 2, "eval_every": None}, "compare held-out losses; give eval_every"),
    ],
)
def test_options_that_need_measurements_are_refused_without_them(inputs, fields, said):
    with pytest.raises(ValueError, match=said):
        configure(inputs, **fields)
