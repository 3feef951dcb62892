"""Tiny runs of the four training commands, and faults that are put into one of their steps.

A run saves a checkpoint at every step: what a fault does to a step must not reach the checkpoint of that step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from waiting import hang

from gemma2.posttrain.distillation.distill import run_distill
from gemma2.posttrain.generation.generate import run_generate
from gemma2.posttrain.preferences.pairs import run_pairs
from gemma2.posttrain.preferences.train import run_reward
from gemma2.posttrain.rl.rlhf import run_rlhf
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import DistillConfig, GenerateConfig, PairsConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.sft.sft import run_sft
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer
from gemma2.posttrain.training import checkpoints

STEPS = 5
END_OF_TURN = 107
QUESTIONS = [f"What is {a} plus {b}?" for a in range(4) for b in range(3)]
SHORT = {"learning_rate": 1e-3, "warmup_steps": 0, "save_every": 1, "eval_every": 100}
BYTES = ("model.safetensors", "metrics.jsonl", "samples.jsonl", "ema/model.safetensors", "pairs.jsonl")

FAULTY: dict[str, object] = {}  # what `reward` does, and from which call on


def reward(prompts: object, completions: list[str], **columns: object) -> list[float]:
    """A signal; or what FAULTY says, from its call number `at` on. The same code always: it is recorded."""
    FAULTY["calls"] = int(str(FAULTY.get("calls", 0))) + 1
    kind = FAULTY.get("kind") if int(str(FAULTY["calls"])) >= int(str(FAULTY.get("at", 0))) else None
    if kind == "hang":
        hang()
    if kind == "raise":
        raise ConnectionError("the reward's server is gone")
    if kind == "exit":
        raise SystemExit(0)
    if kind == "memory":
        raise MemoryError
    values = [float(sum(map(ord, text)) % 17) / 17 for text in completions]
    return {"nan": [float("nan")] * len(values), "constant": [0.5] * len(values)}.get(str(kind), values)


def write_inputs(root: Path) -> Path:
    """A policy that ends its turns, a teacher near it, rows, pairs and prompts."""
    policy = random_model()
    with torch.no_grad():
        policy.model.embed_tokens.weight[END_OF_TURN] *= 6
    for name in ("policy", "teacher"):
        policy.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.01)
    save_random(root / "model")
    rows = {
        "prompts": [{"prompt": question} for question in QUESTIONS],
        "data": [{"prompt": f"What is {i}?", "completion": f"It is {2 * i}."} for i in range(20)],
        "pairs": [{"prompt": f"What is {i}?", "chosen": f"{i} please", "rejected": f"no {i}"} for i in range(20)],
    }
    for name, found in rows.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n", encoding="utf-8")
    return root


def configured(root: Path, command: str, **fields: object) -> Config:
    """The configuration of a tiny run."""
    common = {"batch_size": 4, "max_steps": STEPS, "eval_fraction": 0.2, **SHORT}
    drawn = {"prompts": root / "prompts.jsonl", "heldout": root / "prompts.jsonl", "steps": STEPS, "max_new_tokens": 8}
    if command == "sft":
        return SftConfig.model_validate({"model": root / "model", "data": root / "data.jsonl", **common, **fields})
    if command == "reward":
        return RewardConfig.model_validate({"model": root / "model", "data": root / "pairs.jsonl", **common, **fields})
    if command == "distill":
        given = {"model": root / "policy", "teacher": root / "teacher", "batch_size": 4, **drawn, **SHORT}
        return DistillConfig.model_validate({**given, **fields})
    given = {"policy": root / "policy", "reward_fn": "guard_runs:reward", "prompts_per_step": 2, "n": 3, "mu": 0.3}
    return RlhfConfig.model_validate({**given, "eval_prompts": 4, "max_dead_steps": 1, **drawn, **SHORT, **fields})


def judging(root: Path, **fields: object) -> PairsConfig:
    """The configuration of preference pairs."""
    given = {"model": root / "policy", "prompts": root / "prompts.jsonl", "judge": "guard_runs:reward", "n": 2}
    return PairsConfig.model_validate({**given, "max_new_tokens": 8, "batch_size": 6, **fields})


def answering(root: Path, **fields: object) -> GenerateConfig:
    """The configuration of answers with a reward."""
    given = {"teacher": root / "policy", "prompts": root / "prompts.jsonl", "reward_fn": "guard_runs:reward", "n": 2}
    return GenerateConfig.model_validate({**given, "max_new_tokens": 8, "batch_size": 6, **fields})


RUNNERS: dict[str, Callable[..., object]] = {
    "reward pairs": run_pairs,
    "generate": run_generate,
    "sft": run_sft,
    "reward": run_reward,
    "distill": run_distill,
    "rlhf": run_rlhf,
}


def run(command: str, config: Config, out: Path, resume: bool = False) -> Path:
    """Run a command in this process."""
    RUNNERS[command](config, RunOptions(out, resume=resume))
    return out


def bytes_of(out: Path) -> dict[str, bytes]:
    """The files of an output that a resume must not change."""
    rows = [path.name for path in sorted(out.glob("data*.jsonl"))]
    return {name: (out / name).read_bytes() for name in (*BYTES, *rows) if (out / name).is_file()}


def good_checkpoint(out: Path) -> int:
    """The step of the checkpoint that a resume would take; its weights are finite. 0 without one."""
    folder = out.with_name(f".{out.name}.partial") / "checkpoints"
    found = [path for path in folder.glob("checkpoint-*") if checkpoints.is_complete(path)]
    if not found:
        return 0
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]))
    for file in newest.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), f"{newest.name}/{file.name} holds {name} that is not finite"
    return int(newest.name.rpartition("-")[2])


@contextmanager
def reward_is(kind: str, at: int) -> Iterator[None]:
    """The reward function of RL does something else from its call number `at` on."""
    FAULTY.clear()
    FAULTY.update(kind=kind, at=at)
    try:
        yield
    finally:
        FAULTY.clear()
