"""The same learning: reward curves of plain TRL 1.16 and of ours, same policy, reward, prompts and settings.

    python bench/curves.py MODEL [--seeds 0 1 2] [--steps 40] [--window 10] [--figure docs/curves]

MODEL is a small chat model, such as `distilled` of the quickstart. Both run RLOO with a KL to the fixed policy (TRL's
reference model, our anchor) on the embedded questions; the reward is the share of the letter e, which needs no model.
The seeds are fixed beforehand. A window's value is the mean of its steps over the seeds, its error the spread between
them; the curves overlap where the difference is below three standard errors.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed
from trl import RLOOConfig, RLOOTrainer

from gemma2.core.progress import SILENT
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models.loading import load_policy, quiet_libraries
from gemma2.posttrain.reports.plots.figures import HUES, new_figure, styled, write_figure
from gemma2.posttrain.rl.guards import Guards
from gemma2.posttrain.rl.rloo import AnchoredRlooTrainer
from gemma2.posttrain.rl.rollout import Rollout
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.tiny.tasks import questions

PROMPTS, SAMPLES, LIMIT, BETA, RATE = 4, 4, 28, 0.05, 1e-3
NAMES = {"trl": "TRL 1.16", "gemma2": "ours"}


def reward(text: str) -> float:
    """Share of the letter e, in tenths."""
    return 10 * text.lower().count("e") / max(len(text), 1)


def arguments(folder: str, steps: int, seed: int, **fields: Any) -> RLOOConfig:
    """What both trainers share."""
    return RLOOConfig(
        output_dir=folder,
        max_steps=steps,
        seed=seed,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=LIMIT,
        temperature=1.0,
        top_k=0,
        learning_rate=RATE,
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


def plain(model: Path, folder: str, steps: int, seed: int) -> Any:
    """TRL with its reference model."""
    policy, tokenizer = load_policy(model)
    data = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in questions("train", 512)]
    return RLOOTrainer(
        model=policy,
        reward_funcs=[lambda completions, **_: [reward(completion[0]["content"]) for completion in completions]],
        args=arguments(folder, steps, seed, beta=BETA),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )


def ours(model: Path, folder: str, steps: int, seed: int) -> Any:
    """The trainer of `gemma2 rlhf` with the first policy as its anchor."""
    policy, tokenizer = load_policy(model)
    config = RlhfConfig(
        policy=model, prompts=model, n=SAMPLES, max_new_tokens=LIMIT, temperature=1.0, beta=BETA, anchor="sft"
    )
    rollout = Rollout(
        policy,
        copy.deepcopy(policy).requires_grad_(False),
        ChatFormat(tokenizer, policy.generation_config),
        lambda sampled: {"reward": [reward(text) for text in sampled.texts]},
        config,
        [Prompt("", [{"role": "user", "content": row["prompt"]}]) for row in questions("train", 512)],
        torch.Generator().manual_seed(seed),
        PROMPTS * SAMPLES,
    )
    settings = arguments(folder, steps, seed, beta=0.0, shuffle_dataset=False)
    return AnchoredRlooTrainer(rollout, None, settings, Guards(SILENT, None, 10**9))


def curve(make: Any, model: Path, steps: int, seed: int) -> list[float]:
    """Mean reward of every step."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make(model, folder, steps, seed)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


def windows(curves: list[list[float]], width: int) -> list[tuple[float, float]]:
    """(mean, standard error) over the seeds in every window of `width` steps."""
    table = torch.tensor(curves, dtype=torch.float64)
    means = table[:, : table.shape[1] // width * width].view(len(curves), -1, width).mean(2)  # (seeds, windows)
    errors = means.std(0) / math.sqrt(len(curves))
    return list(zip(means.mean(0).tolist(), errors.tolist(), strict=True))


def draw(curves: dict[str, list[list[float]]], width: int, path: Path) -> None:
    """Every run faint, the windows with their errors in front."""
    with styled():
        figure, (axis,) = new_figure(7.6, 4.0)
        for place, (name, rows) in enumerate(curves.items()):
            for row in rows:
                axis.plot(range(1, len(row) + 1), row, color=HUES[place], lw=0.7, alpha=0.3)
            middles = [width * i + (width + 1) / 2 for i in range(len(windows(rows, width)))]
            means, errors = zip(*windows(rows, width), strict=True)
            marker = {"marker": "os"[place], "ms": 6, "capsize": 3, "lw": 1.6}
            axis.errorbar(middles, means, errors, color=HUES[place], label=NAMES[name], **marker)
        axis.set_xlabel("step")
        axis.set_ylabel("mean reward of the step's completions")
        axis.legend(frameon=False)
        for suffix in (".png", ".svg"):
            write_figure(figure, path.with_suffix(suffix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--figure", type=Path, default=Path("docs/curves"), help="written as .png and .svg")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    curves: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for seed in options.seeds:
        for name, make in (("trl", plain), ("gemma2", ours)):
            curves[name].append(curve(make, options.model, options.steps, seed))
            last = curves[name][-1][-options.window :]
            print(f"seed {seed} {NAMES[name]}: {sum(last) / len(last):.3f}", file=sys.stderr)
    print("| steps | TRL | ours | difference in standard errors |\n| --- | --- | --- | --- |")
    largest = 0.0
    pairs = zip(*(windows(curves[name], options.window) for name in NAMES), strict=True)
    for i, ((a, a_error), (b, b_error)) in enumerate(pairs):
        away = (b - a) / math.hypot(a_error, b_error)
        largest = max(largest, abs(away))
        steps = f"{i * options.window + 1} - {(i + 1) * options.window}"
        print(f"| {steps} | {a:.3f} ({a_error:.3f}) | {b:.3f} ({b_error:.3f}) | {away:+.2f} |")
    print(f"largest difference {largest:.2f} standard errors: the curves {'overlap' if largest < 3 else 'differ'}")
    draw(curves, options.window, options.figure)


if __name__ == "__main__":
    main()
