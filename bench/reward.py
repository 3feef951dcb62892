"""Reward model tokens per second: plain TRL 1.16 in its best setting beside ours, in one run, on the same pairs.

    python bench/reward.py [--size tiny|small] [--pairs 64] [--batch 8] [--rounds 3]

Both train one epoch of the same tokenised pairs of unequal length (prompt log-normal about 60 tokens, answers about 90,
at most 512), same optimizer and batch size, and so as many steps. TRL gets `group_by_length` and the fastest of three
micro-batches (the whole batch, a quarter, one pair). The contenders take turns and change the order every round, so
that a busy machine slows all. Tokens are those of both sides, padding is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from sizes import SIZES
from stopwatch import Stopwatch
from transformers import Gemma2ForSequenceClassification, PrinterCallback
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from gemma2.posttrain.models.loading import load_reward_model, quiet_libraries
from gemma2.posttrain.preferences.pair_examples import PairIds, to_dataset
from gemma2.posttrain.preferences.reward_trainer import make_trainer
from gemma2.posttrain.runs.run_directory import Run, RunOptions
from gemma2.posttrain.schemas import RewardConfig
from gemma2.posttrain.tiny.networks import tiny_config, tiny_tokenizer

LONGEST = 512


def draw_pairs(count: int, vocabulary: int, seed: int = 0) -> list[PairIds]:
    """Pairs of random ids; lengths log-normal."""
    generator = torch.Generator().manual_seed(seed)

    def length(mean: float) -> int:
        return int(math.exp(math.log(mean) + 0.7 * torch.randn((), generator=generator).item())) + 4

    def ids(size: int) -> list[int]:
        return torch.randint(200, vocabulary, (size,), generator=generator).tolist()

    pairs = []
    for _ in range(count):
        prompt = ids(min(length(60), LONGEST // 2))
        sides = [prompt + ids(min(length(90), LONGEST - len(prompt))) for _ in range(2)]
        pairs.append(PairIds(sides[0], sides[1], len(prompt)))
    return pairs


def save_model(path: Path, size: str) -> Path:
    """A random reward model, drawn as transformers does. The large weights of the unit tests' models would make most
    attention weights denormal numbers, which slow every product."""
    torch.manual_seed(0)
    Gemma2ForSequenceClassification(tiny_config(num_labels=1, sliding_window=256, **SIZES[size])).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def plain(options: argparse.Namespace, pairs: list[PairIds], micro: int) -> Any:
    """TRL's trainer on tokenised pairs."""
    model, tokenizer = load_reward_model(options.model)
    arguments = TrlRewardConfig(
        output_dir=str(options.root / "trl"),
        num_train_epochs=1,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,  # it would take the lengths away before they are read
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch // micro,
    )
    return RewardTrainer(model=model, args=arguments, train_dataset=to_dataset(pairs), processing_class=tokenizer)


def ours(options: argparse.Namespace, pairs: list[PairIds]) -> Any:
    """The trainer of `gemma2 reward`, without its run directory."""
    model, tokenizer = load_reward_model(options.model)
    config = RewardConfig(model=options.model, data=options.root, batch_size=options.batch, save_every=10**6)
    run = Run("reward", options.root, RunOptions(options.root / "out"), {"config": {}}, resumed=False)
    return make_trainer(model, tokenizer, pairs, config, run)


def timed(trainer: Any, tokens: int) -> float:
    """Tokens per CPU second; the first batch, not timed, counts as an average one."""
    watch = Stopwatch()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return tokens * len(watch.seconds) / (len(watch.seconds) + 1) / sum(watch.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options.root = Path(folder)
        options.model = save_model(options.root / "model", options.size)
        pairs = draw_pairs(options.pairs, SIZES[options.size]["vocab_size"])
        tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        report(options, tokens, measure(options, pairs, tokens))


def measure(options: argparse.Namespace, pairs: list[PairIds], tokens: int) -> dict[str, list[float]]:
    """Every contender once a round, in turns: tokens per CPU second."""
    contenders: dict[str, Any] = {
        f"trl, micro-batch {micro}": lambda micro=micro: plain(options, pairs, micro)
        for micro in sorted({options.batch, max(1, options.batch // 4), 1})
    }
    contenders["gemma2"] = lambda: ours(options, pairs)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            rates[name].append(timed(contenders[name](), tokens))
            print(f"round {turn + 1} {name}: {rates[name][-1]:.0f} tokens per CPU s", file=sys.stderr)
    return rates


def report(options: argparse.Namespace, tokens: int, rates: dict[str, list[float]]) -> None:
    """Medians, and the ratio to the fastest setting of TRL."""
    medians = {name: statistics.median(found) for name, found in rates.items()}
    document = {
        "size": options.size,
        "pairs": options.pairs,
        "tokens": tokens,
        "tokens_per_cpu_second": {name: round(value) for name, value in medians.items()},
        "speed_up_cpu": medians["gemma2"] / max(value for name, value in medians.items() if name != "gemma2"),
        "speed_up_by_round": [
            own / max(found[turn] for name, found in rates.items() if name != "gemma2")
            for turn, own in enumerate(rates["gemma2"])
        ],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
