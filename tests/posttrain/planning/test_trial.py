"""Three steps tried: what is run, what is timed, what cannot be tried."""

import json
import sys

import pytest
from light_model import light_model

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.planning import trial
from gemma2.posttrain.planning.named_models import NO_ROWS
from gemma2.posttrain.planning.trial import STEPS, try_steps
from gemma2.posttrain.schemas import GenerateConfig, RlhfConfig, SftConfig

WORKER = """
import json, pathlib, sys, time
words = json.loads(sys.argv[1])
out = pathlib.Path(words[words.index("--out") + 1])
folder = out.with_name(f".{out.name}.partial")
folder.mkdir()
for step in range(3):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step + 1, "learning_rate": 1e-5}) + "\\n")
        file.write(json.dumps({"step": step + 1, "heldout_loss": 2.0}) + "\\n")
    time.sleep(0.1)
folder.rename(out)
"""


@pytest.fixture
def model(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 20)
    return light_model(tmp_path / "model")


def test_the_trial_is_the_run_with_three_steps_and_is_timed_between_its_steps(model, tmp_path, monkeypatch):
    seen = []
    plain = trial.subprocess.Popen

    def instead(command, **options):
        assert command[:3] == [sys.executable, "-m", "gemma2.cli.main"]
        seen.append(command[3:])
        return plain([sys.executable, "-c", WORKER, json.dumps(command[3:])], **options)

    monkeypatch.setattr(trial.subprocess, "Popen", instead)
    config = SftConfig(model=model, data=tmp_path / "rows.jsonl", lora_rank=4, warmup_steps=50, max_length=64)
    found = try_steps(config)
    [words] = seen
    assert words[0] == "sft" and words[words.index("--lora-rank") + 1] == "4"
    assert words[words.index("--max-steps") + 1] == str(STEPS)
    assert "--warmup-steps" not in words
    assert found.steps == STEPS
    assert found.seconds >= 0.09  # the pause between two steps of the worker
    assert found.peak > 0


def test_what_cannot_be_tried_says_so_before_anything_runs(model, tmp_path, monkeypatch):
    monkeypatch.setattr(trial.subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
    rows = tmp_path / "rows.jsonl"
    for config, words in (
        (GenerateConfig(teacher=model, prompts=rows), "first steps of a training"),
        (SftConfig(model="9b", data=rows), "--model 9b has no weights"),
        (RlhfConfig(policy=model, prompts=NO_ROWS, reward_fn="m:f"), "no rows are given"),
    ):
        with pytest.raises(UsageError, match=words):
            try_steps(config)


def test_a_trial_that_fails_says_why_in_one_line(model, tmp_path, monkeypatch):
    plain = trial.subprocess.Popen
    script = "import sys; sys.stderr.write('warning: one\\nerror: the rows are odd\\n'); sys.exit(1)"
    monkeypatch.setattr(
        trial.subprocess, "Popen", lambda command, **options: plain([sys.executable, "-c", script], **options)
    )
    with pytest.raises(InputError, match="the trial of --measure failed: the rows are odd; fix that first"):
        try_steps(SftConfig(model=model, data=tmp_path / "rows.jsonl"))


@pytest.mark.slow
def test_three_real_steps(tmp_path):
    from gemma2.posttrain.tiny.networks import save_random

    save_random(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 20)
    found = try_steps(SftConfig(model=tmp_path / "model", data=tmp_path / "rows.jsonl", batch_size=4))
    assert found.steps >= 2
    assert found.seconds > 0
    assert found.peak > 1e8
