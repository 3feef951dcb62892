"""kill -9 at a random step, resume, and the bytes are those of a run that was left alone: with every kind of anchor."""

import random

import pytest
from processes import MAIN, finish, start
from rl_job import environment, words, write_job
from waiting import wait_for

STEPS = 24
LORA = ["--lora-rank", "2", "--learning-rate", "1e-2"]
KINDS = {
    "ema": [],
    "sft": ["--anchor", "sft"],
    "none": ["--anchor", "none"],
    "ema on the host": ["--anchor-memory", "cpu"],
    "ema of a LoRA policy": LORA,
    "ema of factors": [*LORA, "--lora-anchor", "factors"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("job"))


def run(job, out, *more):
    settings = f"--steps {STEPS} --prompts-per-step 2 --n 3 --save-every 3 --eval-every 5 --quiet"
    return start(MAIN, *words(job, out, settings), *more, env=environment(job))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_a_random_step_ends_with_the_bytes_of_one_left_alone(job, tmp_path, kind):
    code, _, err = finish(run(job, tmp_path / "whole", *KINDS[kind]))
    assert code == 0, err
    step = random.randint(3, STEPS // 2)  # a new one every time, told where it fails
    process = run(job, tmp_path / "parts", *KINDS[kind])
    metrics = tmp_path / ".parts.partial" / "metrics.jsonl"
    checkpoints = tmp_path / ".parts.partial" / "checkpoints"  # where the two newest are kept

    def reached():
        return list(checkpoints.glob("checkpoint-*/complete.json")) and f'"step": {step},' in metrics.read_text(
            encoding="utf-8"
        )

    wait_for(lambda: reached() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    code, _, err = finish(run(job, tmp_path / "parts", *KINDS[kind], "--resume"))
    assert code == 0, err
    files = ["model.safetensors", "metrics.jsonl", "samples.jsonl"]
    for name in [*files, "ema/model.safetensors"] if "ema" in kind else files:
        whole, parts = (tmp_path / folder / name for folder in ("whole", "parts"))
        assert parts.read_bytes() == whole.read_bytes(), f"{name}, killed in step {step}"
