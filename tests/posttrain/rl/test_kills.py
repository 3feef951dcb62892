"""kill -9 at a random step, resume, and the bytes are those of a run that was left alone: with every kind of anchor."""

import json
import os
import random
import time

import pytest
import torch
from processes import MAIN, finish, start

from gemma2.posttrain.embedded.tiny import random_model, tiny_tokenizer

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
    root = tmp_path_factory.mktemp("job")
    policy = random_model()
    with torch.no_grad():
        policy.model.embed_tokens.weight[107] *= 8  # ends its turns often enough
    policy.save_pretrained(root / "policy")
    tiny_tokenizer().save_pretrained(root / "policy")
    rows = [json.dumps({"prompt": f"What is {a} plus {b}?"}) for a in range(4) for b in range(3)]
    (root / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "judge.py").write_text("def judge(completions, **columns):\n    return [len(t) % 7 for t in completions]\n")
    return root


def run(job, out, *more):
    inputs = ["--policy", job / "policy", "--prompts", job / "prompts.jsonl", "--heldout", job / "prompts.jsonl"]
    settings = (
        f"--reward-fn judge:judge --steps {STEPS} --prompts-per-step 2 --n 3 --max-new-tokens 16 --temperature 1 "
    )
    settings += "--temperature 1 --learning-rate 1e-3 --warmup-steps 0 --mu 0.3 --save-every 3 --eval-every 5 "
    settings += "--eval-prompts 6 --quiet"
    environment = {**os.environ, "PYTHONPATH": str(job), "OMP_NUM_THREADS": "1"}
    return start(MAIN, "rlhf", *inputs, *settings.split(), "--out", out, *more, env=environment)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_a_random_step_ends_with_the_bytes_of_one_left_alone(job, tmp_path, kind):
    code, _, err = finish(run(job, tmp_path / "whole", *KINDS[kind]), 120)
    assert code == 0, err
    step = random.randint(3, STEPS // 2)  # a new one every time, told where it fails
    process = run(job, tmp_path / "parts", *KINDS[kind])
    metrics = tmp_path / ".parts.partial" / "metrics.jsonl"
    checkpoint = tmp_path / ".parts.partial" / "checkpoints" / "checkpoint-3" / "complete.json"
    while not (checkpoint.exists() and f'"step": {step},' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    code, _, err = finish(run(job, tmp_path / "parts", *KINDS[kind], "--resume"), 120)
    assert code == 0, err
    files = ["model.safetensors", "metrics.jsonl", "samples.jsonl"]
    for name in [*files, "ema/model.safetensors"] if "ema" in kind else files:
        whole, parts = (tmp_path / folder / name for folder in ("whole", "parts"))
        assert parts.read_bytes() == whole.read_bytes(), f"{name}, killed in step {step}"
