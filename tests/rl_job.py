"""What an RL run from the command line needs: a folder with a tiny policy, prompts and a judge."""

import json
import os
from pathlib import Path

import torch

from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

JUDGE = """def judge(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]
"""


def write_job(root: Path) -> Path:
    """Fill `root`; its policy ends its turns often enough to be sampled from."""
    policy = random_model()
    with torch.no_grad():
        policy.model.embed_tokens.weight[107] *= 8
    policy.save_pretrained(root / "policy")
    tiny_tokenizer().save_pretrained(root / "policy")
    rows = [json.dumps({"prompt": f"What is {a} plus {b}?"}) for a in range(4) for b in range(3)]
    (root / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "judge.py").write_text(JUDGE, encoding="utf-8")
    return root


def words(job: Path, out: Path, settings: str) -> list[str]:
    """The command line after `gemma2`."""
    inputs = (
        f"--policy {job}/policy --prompts {job}/prompts.jsonl --heldout {job}/prompts.jsonl --reward-fn judge:judge"
    )
    shared = "--max-new-tokens 16 --temperature 1 --learning-rate 1e-3 --warmup-steps 0 --eval-prompts 6"
    shared += "" if "--anchor" in settings.split() else " --mu 0.3"
    return ["rlhf", *inputs.split(), *shared.split(), *settings.split(), "--out", str(out)]


def environment(job: Path) -> dict[str, str]:
    """Where the judge is found; one thread."""
    return {**os.environ, "PYTHONPATH": str(job), "OMP_NUM_THREADS": "1"}
