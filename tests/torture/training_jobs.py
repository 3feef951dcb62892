"""Trainings on tiny models, each a second or less, and how they end."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gemma2.core.errors import Gemma2Error
from gemma2.core.progress import SILENT
from gemma2.posttrain.distillation.distill import run_distill
from gemma2.posttrain.preferences.train import run_reward
from gemma2.posttrain.rl.rlhf import run_rlhf
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.sft.sft import run_sft
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer

END_OF_TURN = 107
WORDS = ("honey", "glass", "wool", "salt", "copper")
Job = Callable[[Path, Path, object], object]


class Warnings:
    """A progress that keeps warnings, and interrupts a run once its bar has advanced by more than `after`."""

    def __init__(self, after: int = 10**9) -> None:
        self.said: list[str] = []
        self.left = after
        self.warn, self.note = self.said.append, SILENT.note

    @contextmanager
    def task(self, label, total, unit):
        yield self

    def advance(self, amount=1, **fields):
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


def judge(prompts, completions, **columns):
    """A reward that varies with the text."""
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]


def write_inputs(root: Path, seed: int = 0) -> Path:
    """Models that often end their turns, prompts, conversations and pairs for every job."""
    for name, own in (("model", 0), ("teacher", 1)):
        model = random_model(10 * seed + own)
        with torch.no_grad():
            model.model.embed_tokens.weight[END_OF_TURN] *= 8
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    save_random(root / "reward", seed=10 * seed + 2, kind="reward")
    save_random(root / "other", seed=10 * seed + 3, kind="reward")
    draw = random.Random(seed)
    answers = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))) for _ in range(24)]
    rows = {
        "prompts": [{"prompt": f"What is {i} plus 2?"} for i in range(12)],
        "rows": [{"prompt": f"What is {i}?", "completion": answer} for i, answer in enumerate(answers)],
        "pairs": [{"prompt": f"What is {i}?", "chosen": f"{a} please", "rejected": a} for i, a in enumerate(answers)],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


STEPS = 2


def sft(root: Path, out: Path, progress: object, **fields: object) -> object:
    """Supervised fine-tuning; the last step is measured."""
    given = {"learning_rate": 3e-3, "batch_size": 8, "eval_fraction": 0.2, "max_steps": STEPS, "save_every": 1}
    config = SftConfig(model=root / "model", data=root / "rows.jsonl", **(given | fields))
    return run_sft(config, RunOptions(out), progress)


def reward(root: Path, out: Path, progress: object, **fields: object) -> object:
    """A reward model from pairs."""
    given = {"learning_rate": 1e-2, "batch_size": 8, "eval_fraction": 0.2, "max_steps": STEPS}
    config = RewardConfig(model=root / "model", data=root / "pairs.jsonl", **(given | fields))
    return run_reward(config, RunOptions(out), progress)


def distilled(root: Path, out: Path, progress: object, **fields: object) -> object:
    """On-policy distillation."""
    given = {"learning_rate": 1e-3, "batch_size": 4, "max_new_tokens": 8, "steps": STEPS, "eval_every": 1}
    config = DistillConfig(
        model=root / "model", teacher=root / "teacher", prompts=root / "prompts.jsonl", **(given | fields)
    )
    return run_distill(config, RunOptions(out), progress)


def rl(root: Path, out: Path, progress: object, **fields: object) -> object:
    """RL from a reward model, or from a function."""
    given = {"steps": STEPS, "prompts_per_step": 2, "n": 3, "max_new_tokens": 16, "temperature": 1.0}
    given |= {"mu": 0.3} if fields.get("anchor", "ema") == "ema" else {}
    given |= {"learning_rate": 1e-3, "warmup_steps": 0, "eval_every": 1, "eval_prompts": 12, "save_every": 100}
    given |= {"heldout": root / "prompts.jsonl"}
    given |= {} if {"reward", "reward_fn"} & fields.keys() else {"reward": root / "reward"}
    config = RlhfConfig(policy=root / "model", prompts=root / "prompts.jsonl", **(given | fields))
    return run_rlhf(config, RunOptions(out), progress)


def with_fields(job: Job, **fields: object) -> Job:
    """A job with other settings."""
    return lambda root, out, progress: job(root, out, progress, **fields)


def both_rewards(root: Path, out: Path, progress: object) -> object:
    """RL from two reward models and a function."""
    return rl(root, out, progress, reward=(root / "reward", root / "other"), reward_fn="training_jobs:judge")


def resumed(root: Path, out: Path, progress: object) -> object:
    """SFT that was interrupted behind its first checkpoint, and goes on."""
    config = SftConfig(
        model=root / "model", data=root / "rows.jsonl", learning_rate=3e-3, batch_size=8, max_steps=4, save_every=1
    )
    with pytest.raises(KeyboardInterrupt):
        run_sft(config, RunOptions(out), Warnings(after=3))
    return run_sft(config, RunOptions(out, resume=True), progress)


CLEAN: dict[str, Job] = {
    "sft": sft,
    "sft, LoRA, micro-batches": with_fields(sft, lora_rank=2, lora_dropout=0.1, micro_batch_size=2),
    "sft, resumed": resumed,
    "distill": distilled,
    "reward": with_fields(reward, dropout=0.1),
    "reward, LoRA": with_fields(reward, lora_rank=2),
    "rlhf": rl,
    "rlhf, LoRA": with_fields(rl, lora_rank=2),
    "rlhf, LoRA, factors": with_fields(rl, lora_rank=2, lora_anchor="factors"),
    "rlhf, anchor in host memory": with_fields(rl, anchor_memory="cpu"),
    "rlhf, no anchor": with_fields(rl, anchor="none", micro_batch_size=3),
    "rlhf, anchor of SFT": with_fields(rl, anchor="sft"),
    "rlhf, three rewards": both_rewards,
    "rlhf, a paper's rate": with_fields(rl, learning_rate=1e-6, mu=0.01, warmup_steps=1),
}


@dataclass
class Outcome:
    """How a run ended: with an error of ours, or complete; and what it warned of."""

    error: Gemma2Error | None
    warnings: list[str]

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join([str(self.error or ""), *self.warnings])


def observe(job: Job, root: Path, out: Path) -> Outcome:
    """Run a job to its end. Errors that are none of ours pass."""
    progress = Warnings()
    try:
        job(root, out, progress)
    except Gemma2Error as error:
        return Outcome(error, progress.said)
    return Outcome(None, progress.said)
