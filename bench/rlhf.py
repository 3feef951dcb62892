"""RL steps per CPU second: plain TRL 1.16 beside ours, in one run, on the same models, prompts and lengths.

    python bench/rlhf.py [--size tiny|small|wide] [--steps 6] [--rounds 3] [--ends]

Both train a random Gemma 2 with RLOO, a reward model on the same backbone and an EMA anchor (TRL: `sync_ref_model` each
step), in fp32 on the CPU. They take turns, so that a busy machine slows both. Without `--ends` every completion runs to
the limit; with it completions end at random, after half of the limit on average.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sizes import SIZES
from stopwatch import Stopwatch
from transformers import AutoModelForSequenceClassification, PrinterCallback
from trl import RLOOConfig, RLOOTrainer

from gemma2.merging.progress import SILENT
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.embedded.tasks import questions
from gemma2.posttrain.embedded.tiny import random_model, save_random, tiny_tokenizer
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.rl.ema import EmaAnchor
from gemma2.posttrain.rl.guards import Guards
from gemma2.posttrain.rl.rlhf import AnchorUpdate
from gemma2.posttrain.rl.rloo import AnchoredRlooTrainer
from gemma2.posttrain.rl.rollout import Rollout
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.training.trainer import quiet_libraries

WINDOW = {"sliding_window": 64}
PROMPTS, SAMPLES, LIMIT, TEMPERATURE, BETA, MU = 4, 4, 24, 1.0, 0.1, 0.05


def write_models(root: Path, size: dict[str, Any], ends: bool) -> None:
    """Policy and reward model with random weights; `ends` lets completions stop half way on average."""
    policy = random_model(0, **WINDOW, **size)
    if ends:
        with torch.no_grad():
            policy.model.embed_tokens.weight[107] *= 8
    policy.save_pretrained(root / "policy")
    tiny_tokenizer().save_pretrained(root / "policy")
    save_random(root / "reward", 1, "reward", **WINDOW, **size)


def arguments(root: Path, steps: int, **fields: Any) -> RLOOConfig:
    """What both trainers share."""
    return RLOOConfig(
        output_dir=str(root / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=LIMIT,
        temperature=TEMPERATURE,
        learning_rate=1e-5,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        **fields,
    )


def plain(root: Path, rows: list[dict[str, str]], steps: int) -> list[float]:
    """TRL as its documentation has it: reference model synchronised every step, reward model as reward function."""
    policy, tokenizer = load_policy(root / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(root / "reward", attn_implementation="eager")
    data = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=[reward],
        args=arguments(root, steps, beta=BETA, sync_ref_model=True, ref_model_mixup_alpha=MU, ref_model_sync_steps=1),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    return timed(trainer)


def ours(root: Path, rows: list[dict[str, str]], steps: int) -> list[float]:
    """The trainer of `gemma2 rlhf`, without its run directory."""
    policy, tokenizer = load_policy(root / "policy")
    chat = ChatFormat(tokenizer, policy.generation_config)
    config = RlhfConfig(
        policy=root / "policy",
        reward=root / "reward",
        prompts=root,
        n=SAMPLES,
        max_new_tokens=LIMIT,
        temperature=TEMPERATURE,
        beta=BETA,
    )
    anchor = EmaAnchor(policy)
    prompts = [Prompt("", [{"role": "user", "content": row["prompt"]}]) for row in rows]
    score = reward_score(config, chat, PROMPTS * SAMPLES)
    generator = torch.Generator().manual_seed(0)
    rollout = Rollout(policy, anchor.model, chat, score, config, prompts, generator, PROMPTS * SAMPLES)
    trainer = AnchoredRlooTrainer(
        rollout, anchor, arguments(root, steps, beta=0.0, shuffle_dataset=False), Guards(SILENT, None, 10**9)
    )
    trainer.guards.observe = lambda step, metrics: None  # type: ignore[method-assign]  # random models are all cut
    trainer.add_callback(AnchorUpdate(anchor, MU))
    return timed(trainer)


def timed(trainer: Any) -> list[float]:
    """CPU seconds per step."""
    watch = Stopwatch()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ends", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"trl": [], "gemma2": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_models(root, SIZES[options.size], options.ends)
        rows = questions("train", 64)
        for turn in range(options.rounds):
            for name, run in (("trl", plain), ("gemma2", ours)):
                seconds[name] += run(root, rows, options.steps)
                print(f"round {turn + 1} {name}: {statistics.median(seconds[name]):.3f} s per step", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "size": options.size,
                "ends": options.ends,
                "completions": PROMPTS * SAMPLES,
                "limit": LIMIT,
                "cpu_seconds_per_step": medians,
                "speed_up": medians["trl"] / medians["gemma2"],
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
