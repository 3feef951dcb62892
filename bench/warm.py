"""WARM in miniature: reward models from one probed head, their average, and labels of which a quarter is wrong.

    python bench/warm.py --model DIR --pairs DIR [--steps 200] [--members 3] [--flip 0.25]

DIR: the `distilled` and `pairs` of a `gemma2 quickstart`. A fifth of the prompts is held out; a probe is fitted on the
rest, and `--members` reward models start from it with different seeds (data order), learning rates and dropout, as
WARM varies them (2401.12187, section 3), once on the labels as they are and once on labels of which `--flip` are
turned around. Printed: accuracy on the held-out pairs, all with right labels, of the probe, the members and the mean
of their weights (`gemma2 merge linear`); and on the training pairs apart by whether their label was turned: `True` is
the share of wrong labels that were learned by heart.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from gemma2.merging import MergeRequest, merge
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import split
from gemma2.posttrain.data.sources import iter_rows, to_line
from gemma2.posttrain.preferences.probe import run_probe
from gemma2.posttrain.preferences.reward_eval import run_reward_eval
from gemma2.posttrain.preferences.train import run_reward
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import ProbeConfig, RewardConfig, RewardEvalConfig
from gemma2.posttrain.schemas.fields import RowFields

RATES, DROPOUT = (5e-4, 3e-4, 7e-4), (0.0, 0.05, 0.1)


def write_sets(options: argparse.Namespace, root: Path) -> None:
    """heldout.jsonl, right.jsonl, and turned.jsonl, whose rows say whether their label was turned."""
    training, heldout = split(Reading(RowFields()).pairs(options.pairs), 0.2, 0)
    where = {pair.where for pair in heldout}
    draw = random.Random(0)
    with ExitStack() as stack:
        names = ("heldout", "right", "turned")
        held, right, turned = (stack.enter_context((root / f"{name}.jsonl").open("wb")) for name in names)
        for row in iter_rows(options.pairs):
            if row.where in where:
                held.write(to_line(row.columns))
                continue
            flip = draw.random() < options.flip
            right.write(to_line(row.columns))
            turned.write(to_line((_turned(row.columns) if flip else row.columns) | {"turned": flip}))
    print(f"{len(training)} pairs to train on, {len(heldout)} held out", file=sys.stderr)


def _turned(columns: dict[str, Any]) -> dict[str, Any]:
    names = {"chosen": "rejected", "rejected": "chosen"}
    return {
        names.get(key.partition("_")[0], key.partition("_")[0]) + key[len(key.partition("_")[0]) :]: value
        for key, value in columns.items()
    }


def train_members(options: argparse.Namespace, root: Path, labels: str) -> list[Path]:
    """The probe, the members, and the average of their weights."""
    probe = root / labels / "probe"
    run_probe(ProbeConfig(model=options.model, data=root / f"{labels}.jsonl", max_length=96), RunOptions(probe))
    members = []
    for seed in range(options.members):
        config = RewardConfig(
            model=options.model,
            data=root / f"{labels}.jsonl",
            from_head=probe,
            seed=seed,
            learning_rate=RATES[seed % len(RATES)],
            dropout=DROPOUT[seed % len(DROPOUT)],
            max_steps=options.steps,
            warmup_steps=20,
            max_length=96,
            epochs=100,
            eval_fraction=0,
            save_every=10**6,
        )
        members.append(root / labels / f"member-{seed}")
        run_reward(config, RunOptions(members[-1]))
        print(f"{labels}: member {seed} trained", file=sys.stderr)
    merge(MergeRequest(method="linear", models=tuple(members)), out=root / labels / "warm")
    return [probe, *members, root / labels / "warm"]


def figures(models: list[Path], data: Path, by: str | None = None) -> dict[str, Any]:
    """Accuracy, its error, loss and calibration of every model; by the values of a column the accuracy."""
    found = run_reward_eval(RewardEvalConfig(models=tuple(models), data=data, by=by))
    names = ("accuracy", "accuracy_error", "loss", "calibration_error")
    return {
        Path(model["model"]).name: {name: round(model[name], 4) for name in names}
        | ({value: round(part["accuracy"], 4) for value, part in model["by"].items()} if by else {})
        for model in found["models"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--flip", type=float, default=0.25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sets(options, root)
        document: dict[str, Any] = {}
        for labels in ("right", "turned"):
            models = train_members(options, root, labels)
            document[labels] = {"heldout": figures(models, root / "heldout.jsonl")}
            if labels == "turned":
                document[labels]["training, turned or not"] = figures(models, root / "turned.jsonl", by="turned")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
