"""What the checks of the first two steps cost, against a step, on random Gemma 2 models of 16 M parameters.

    python bench/first_steps.py [--size small] [--steps 4]

Every check is timed where it is called, in CPU seconds of the same run, so that a busy machine slows both. A step is
the median of those behind the first two. Printed per command: what a checked step spends on checks, what is spent once
at the start, and both as shares of a step. The guards are off: a random model never ends a completion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sizes import SIZES
from transformers import Trainer, TrainerCallback

from gemma2.core.progress import SILENT
from gemma2.posttrain.preferences.reward_trainer import PairTrainer
from gemma2.posttrain.preferences.train import run_reward
from gemma2.posttrain.rl import rlhf, rloo
from gemma2.posttrain.rl.first_rollouts import FirstAnchors
from gemma2.posttrain.rl.guards import Guards
from gemma2.posttrain.rl.rollout import Rollout
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.sft import sft
from gemma2.posttrain.sft.sft_trainer import SftTrainer
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer
from gemma2.posttrain.tiny.tasks import questions
from gemma2.posttrain.training import trainer
from gemma2.posttrain.training.first_steps import STEPS, FirstSteps

ONCE = {
    "forward": (trainer, "check_forward"),
    "one row": (SftTrainer, "check_one_row"),
    "one pair": (PairTrainer, "check_one_pair"),
    "targets": (sft, "check_targets"),
    "start": (FirstSteps, "on_train_begin"),
    "start of the anchor": (FirstAnchors, "on_train_begin"),
}
EACH = {
    "gradient": (FirstSteps, "on_pre_optimizer_step"),
    "update": (FirstSteps, "on_optimizer_step"),
    "anchor": (FirstAnchors, "on_optimizer_step"),
    "batch": (Rollout, "check"),
    "loss": (rloo, "check_loss"),
    "targets of a step": (SftTrainer, "_count_targets"),
}


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """CPU seconds between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *given: object, **options: object) -> None:
        self.ends.append(time.process_time())


def timed(spent: dict[str, float], name: str, place: Any, attribute: str) -> None:
    """Replace a check by one that adds its CPU seconds to `spent`."""
    check = getattr(place, attribute)

    def run(*given: object, **options: object) -> object:
        begin = time.process_time()
        try:
            return check(*given, **options)
        finally:
            spent[name] += time.process_time() - begin

    setattr(place, attribute, run)


def write_inputs(root: Path, size: str) -> None:
    """A policy, a reward model, conversations, pairs and prompts."""
    random_model(0, **SIZES[size]).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    save_random(root / "reward", seed=1, kind="reward", **SIZES[size])
    asked = [row["prompt"] for row in questions("train", 400)]
    rows = {
        "prompts": [{"prompt": text} for text in asked],
        "rows": [{"prompt": text, "completion": " ".join([text] * 4)} for text in asked],
        "pairs": [{"prompt": text, "chosen": " ".join([text] * 4), "rejected": text} for text in asked],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def jobs(root: Path, steps: int) -> dict[str, Callable[[Path], object]]:
    """The trainings that are measured."""
    shared = {"learning_rate": 1e-5, "seed": 0}
    rl = RlhfConfig(
        policy=root / "model", reward=root / "reward", prompts=root / "prompts.jsonl", steps=steps, eval_every=10**6,
        max_new_tokens=48, temperature=1.0, eval_prompts=2, warmup_steps=0, **shared,
    )  # fmt: skip
    rows = SftConfig(model=root / "model", data=root / "rows.jsonl", batch_size=32, max_steps=steps, **shared)
    pairs = RewardConfig(model=root / "model", data=root / "pairs.jsonl", batch_size=32, max_steps=steps, **shared)
    return {
        "rlhf": lambda out: rlhf.run_rlhf(rl, RunOptions(out), SILENT),
        "sft": lambda out: sft.run_sft(rows, RunOptions(out), SILENT),
        "reward": lambda out: run_reward(pairs, RunOptions(out), SILENT),
    }


def main() -> None:
    """Measure every job once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spent: dict[str, float] = defaultdict(float)
    for name, place in {**ONCE, **EACH}.items():
        timed(spent, name, *place)
    clocks: list[Clock] = []
    create = Trainer.create_optimizer

    def created(self: Any, *given: Any, **more: Any) -> Any:
        clocks.append(Clock())
        self.add_callback(clocks[-1])
        return create(self, *given, **more)

    Trainer.create_optimizer = created
    Guards.measured = Guards.observe = lambda *given: None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_inputs(root, options.size)
        for name, job in jobs(root, options.steps).items():
            spent.clear()
            job(root / f"{name}-out")
            ends = clocks[-1].ends
            step = statistics.median(after - before for before, after in pairwise(ends[1:]))
            each = sum(spent[key] for key in EACH) / STEPS
            once = sum(spent[key] for key in ONCE)
            parts = ", ".join(f"{key} {value * 1000:.1f} ms" for key, value in sorted(spent.items()) if value)
            print(f"{name}: a step {step:.2f} s; checks of a step {each / step:.2%}, at the start {once / step:.2%}")
            print(f"  {parts}")


if __name__ == "__main__":
    main()
