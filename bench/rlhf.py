"""RL steps per CPU second and peak memory: plain TRL 1.16 beside ours, on the same models, prompts and lengths.

    python bench/rlhf.py [--size tiny|small|wide] [--lengths full|varying] [--prompts 4] [--samples 4] [--limit 24]
                         [--steps 4] [--rounds 3] [--trl-micro N]
    python bench/rlhf.py --gpu [--attention eager flex_attention flash_attention_2 flash_attention_3]

Both train a random Gemma 2 with RLOO, a reward model on the same backbone and an EMA anchor (TRL: `sync_ref_model` each
step), in fp32 on the CPU. They take turns, each in a process of its own, so that a busy machine slows both and peak
memory is a contender's own. All rows of a step have lengths given beforehand, the same for both: the limit, or uniform
from 1 to the limit, half of it on average. The peer is at its best: no activation checkpointing, the same dtype, one
thread, sampling without top-k or top-p, and, with `--trl-micro`, the micro-batch that suits it.

`--gpu` measures the shape of Gemma 2 2B, 16 prompts x 4 samples x 256 tokens: seconds per step, the share of each
phase, memory. `--gpu --size tiny --prompts 2 --limit 8` walks the same path on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from shapes import SIZES as SHAPES
from sizes import SIZES
from stopwatch import Stopwatch, peak_mib
from transformers import AutoModelForSequenceClassification, LogitsProcessor, LogitsProcessorList, PrinterCallback
from trl import RLOOConfig, RLOOTrainer

from gemma2.core.progress import SILENT
from gemma2.posttrain.attention.kernels import installed_kernels
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models import sampler
from gemma2.posttrain.models.loading import default_device, load_policy, quiet_libraries
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.rl.ema import EmaAnchor
from gemma2.posttrain.rl.guards import Guards
from gemma2.posttrain.rl.rloo import AnchoredRlooTrainer
from gemma2.posttrain.rl.rollout import Rollout
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer
from gemma2.posttrain.tiny.tasks import questions
from gemma2.posttrain.training.first_steps import STEPS

WINDOW = {"sliding_window": 64}
TEMPERATURE, BETA, MU = 1.0, 0.1, 0.05
END = 107  # <end_of_turn>
STOPS, FILLER = (1, END), 100
GPU = {"prompts": 16, "samples": 4, "limit": 256, "size": "2b", "steps": 3, "rounds": 1}
CPU = {"prompts": 4, "samples": 4, "limit": 24, "size": "tiny", "steps": 4, "rounds": 3}


def shape(size: str) -> dict[str, Any]:
    """Fields of a Gemma 2 configuration."""
    if size in SIZES:
        return SIZES[size] | WINDOW
    hidden, layers, inner, heads, kv_heads, head = SHAPES[size]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "vocab_size": 256_000,
        "sliding_window": 4096,
    }


def write_models(root: Path, size: str) -> None:
    """Policy and reward model with random weights."""
    random_model(0, **shape(size)).save_pretrained(root / "policy")
    tiny_tokenizer().save_pretrained(root / "policy")
    save_random(root / "reward", 1, "reward", **shape(size))


def lengths(options: argparse.Namespace) -> torch.Tensor:
    """(steps, rows): tokens of every completion, the last one ends the turn."""
    size = options.steps + 1, options.prompts * options.samples
    if options.lengths == "full":
        return torch.full(size, options.limit)
    return torch.randint(1, options.limit + 1, size, generator=torch.Generator().manual_seed(0))


def arguments(root: Path, options: argparse.Namespace, micro: int, **fields: Any) -> RLOOConfig:
    """What both trainers share."""
    rows = options.prompts * options.samples
    return RLOOConfig(
        output_dir=str(root / "trainer"),
        max_steps=options.steps + 1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        steps_per_generation=rows // micro,
        num_generations=options.samples,
        max_completion_length=options.limit,
        temperature=TEMPERATURE,
        top_k=0,
        learning_rate=1e-5,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        activation_checkpointing=options.gpu,
        **fields,
    )


class Ends(LogitsProcessor):
    """Ends every row of `generate` at its length and nowhere else."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.call, self.token = -1, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.token += 1
        scores[:, list(STOPS)] = -torch.inf
        ending = (self.table[self.call] == self.token).to(scores.device)
        scores[ending] = -torch.inf
        scores[ending, END] = 0.0
        return scores


def plain(root: Path, rows: list[dict[str, str]], options: argparse.Namespace) -> Any:
    """TRL as its documentation has it: reference model synchronised every step, reward model as reward function."""
    attention = options.attention[0]
    policy, tokenizer = load_policy(root / "policy", attention=attention)
    policy.generation_config.eos_token_id = list(STOPS)
    reward = AutoModelForSequenceClassification.from_pretrained(root / "reward", attn_implementation=attention)
    ends, generate = Ends(lengths(options)), policy.generate

    def ending(*positional: Any, **named: Any) -> Any:
        ends.call, ends.token = ends.call + 1, 0
        return generate(*positional, logits_processor=LogitsProcessorList([ends]), **named)

    policy.generate = ending
    anchor = {"beta": BETA, "sync_ref_model": True, "ref_model_mixup_alpha": MU, "ref_model_sync_steps": 1}
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=[reward],
        args=arguments(root, options, options.trl_micro or options.prompts * options.samples, **anchor),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]),
        processing_class=tokenizer,
    )
    trainer.phases = watched(
        trainer,
        draw="_generate",
        reward="_calculate_rewards",
        scoring="_get_per_token_logps_and_entropies",
        forward="_compute_loss",
    )
    return trainer


class FixedLengths(Rollout):
    """Our rollout with lengths from outside: a uniform of 2 ends a row (see `ending_draw`)."""

    table: torch.Tensor
    call: int = -1

    def draw(self, prompts: Any) -> Any:
        self.call += 1
        rows, limit = len(self.table[self.call]), self.config.max_new_tokens
        uniforms = torch.rand(rows, limit, dtype=torch.float64, generator=self.generator)
        uniforms[torch.arange(rows), self.table[self.call] - 1] = 2.0
        params = sampler.SamplingParams(limit, self.config.temperature, self.config.n)
        stops, pad = self.chat.stop_ids, self.chat.tokenizer.pad_token_id
        return sampler.sample(self.policy, prompts, params, stops, pad, None, self.batch_size, uniforms)


def ending_draw(draw: Any) -> Any:
    """`sampler.draw` that ends a row where its uniform is 2, and nowhere else."""

    def drawn(logits: torch.Tensor, uniforms: torch.Tensor, params: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logps = draw(logits, uniforms.clamp(max=0.5), params)
        stopped = (tokens == STOPS[0]) | (tokens == STOPS[1])  # no tensor of the host: a CUDA graph could not have it
        tokens = tokens.where(~stopped, FILLER)
        return tokens.where(uniforms < 2, END), logps

    return drawn


def ours(root: Path, rows: list[dict[str, str]], options: argparse.Namespace) -> Any:
    """The trainer of `gemma2 rlhf`, without its run directory."""
    count = options.prompts * options.samples
    policy, tokenizer = load_policy(root / "policy", attention=options.attention[0])
    chat = ChatFormat(tokenizer, policy.generation_config)
    models = {"policy": root / "policy", "reward": root / "reward", "prompts": root}
    config = RlhfConfig(**models, n=options.samples, max_new_tokens=options.limit, temperature=TEMPERATURE, beta=BETA)
    prompts = [Prompt("", [{"role": "user", "content": row["prompt"]}]) for row in rows]
    score = reward_score(config, chat, count)
    rollout = FixedLengths(policy, None, chat, score, config, prompts, torch.Generator().manual_seed(0), count)
    rollout.table = lengths(options)
    rollout.unchecked = 0  # tokens are replaced after they are drawn, which the checks of the first steps would notice
    sampler.draw = ending_draw(sampler.draw)
    guards = Guards(SILENT, None, 10**9)
    guards.observe = lambda step, metrics: None  # type: ignore[method-assign]  # random models are all cut
    trainer = AnchoredRlooTrainer(
        rollout, None, arguments(root, options, count, beta=0.0, shuffle_dataset=False), guards
    )
    trainer.rollouts = STEPS  # no check of the loss either
    trainer.follow(EmaAnchor(policy), MU)
    trainer.phases = watched(rollout, draw="draw", reward="scores", scoring="log_ratios") | watched(
        trainer, forward="_compute_loss"
    )
    return trainer


def watched(thing: Any, **methods: str) -> dict[str, list[float]]:
    """Seconds of every call of these methods, by phase; an accelerator is waited for."""
    seconds: dict[str, list[float]] = defaultdict(list)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def watch(phase: str, method: Any) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            before = clock()
            result = method(*positional, **named)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[phase].append(clock() - before)
            return result

        return call

    for phase, name in methods.items():
        setattr(thing, name, watch(phase, getattr(thing, name)))
        seconds[phase] = []
    return seconds


def contend(name: str, root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one contender in this process."""
    quiet_libraries()
    torch.set_num_threads(options.threads)
    rows = questions("train", 64)
    trainer = (plain if name == "trl" else ours)(root, rows, options)
    watch = Stopwatch()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    total = sum(sum(values) for values in trainer.phases.values())
    spent = sum(watch.wall if torch.cuda.is_available() else watch.seconds) * (options.steps + 1) / options.steps
    shares = {phase: sum(values) / max(spent, total) for phase, values in trainer.phases.items()}
    return {
        "cpu": watch.seconds,
        "wall": watch.wall,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_mib(),
        "shares": shares | {"rest": 1 - sum(shares.values())},
    }


def in_own_process(name: str, root: Path, options: argparse.Namespace, attention: str) -> dict[str, Any]:
    """`contend` in a fresh process."""
    fields = {key: value for key, value in vars(options).items() if value not in (None, False)}
    fields |= {"only": name, "root": root, "attention": attention}
    command = [sys.executable, __file__]
    for key, value in fields.items():
        command += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | threads)
    return json.loads(finished.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turns: medians over the steps of all rounds, and ratios to TRL."""
    contenders = {"trl": ("trl", "eager")} | {f"gemma2 {name}": ("gemma2", name) for name in options.attention}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options.size)
        for turn in range(options.rounds):
            for name, (who, attention) in contenders.items():
                found[name].append(in_own_process(who, Path(folder), options, attention))
                print(f"round {turn + 1} {name}: {statistics.median(found[name][-1]['cpu']):.3f} CPU s per step",
                      file=sys.stderr)  # fmt: skip
    table: dict[str, Any] = {}
    for name, runs in found.items():
        table[name] = {
            "cpu_seconds_per_step": statistics.median(s for run in runs for s in run["cpu"]),
            "wall_seconds_per_step": statistics.median(s for run in runs for s in run["wall"]),
            "peak_mib": statistics.median(run["peak_mib"] for run in runs),
            "shares": {k: round(statistics.median(run["shares"][k] for run in runs), 3) for k in runs[0]["shares"]},
        }
    for row in table.values():
        row["times_as_fast"] = {
            kind: table["trl"][f"{kind}_seconds_per_step"] / row[f"{kind}_seconds_per_step"] for kind in ("cpu", "wall")
        }
        row["memory_of_trl"] = row["peak_mib"] / table["trl"]["peak_mib"]
    by_round = [
        statistics.median(one["cpu"]) / statistics.median(other["cpu"])
        for one, other in zip(found["trl"], found[f"gemma2 {options.attention[0]}"], strict=True)
    ]
    return {"contenders": table, "ratio_by_round": by_round}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, *SHAPES])
    for name in ("prompts", "samples", "limit", "steps", "rounds", "trl-micro"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", choices=["full", "varying"], default="full")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--attention", nargs="+")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in (GPU if options.gpu else CPU).items():
        setattr(options, name, getattr(options, name) or value)
    if options.only:
        print(json.dumps(contend(options.only, options.root, options)))
        return
    options.attention = options.attention or available(options.gpu)
    given = {name: value for name, value in vars(options).items() if name not in ("only", "root")}
    print(json.dumps(given | compare(options), indent=2))


def available(gpu: bool) -> list[str]:
    """eager, and on a GPU what else can train here."""
    return ["eager", *(installed_kernels(default_device()) if gpu else [])]


if __name__ == "__main__":
    main()
