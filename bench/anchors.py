"""The EMA anchor beside the fixed anchor: reward and KL on held-out prompts along RL runs at the same betas.

    python bench/anchors.py QUICKSTART [--betas 0.05 0.2] [--seeds 0 1 2] [--steps 80] [--out runs/anchors]

QUICKSTART is a directory that `gemma2 quickstart` wrote; it is made when it is not there. Policy and SFT model are its
distilled student, the reward is its reward model. Every evaluation of every run is a point (reward, KL to the SFT
model, standard errors). The seeds are fixed beforehand, mu * steps is 4, the other settings are the recipe's. A run
that is finished is not repeated. WARP (2406.16768, section 3.1 and figure 4) has the trajectory of the EMA anchor above
that of the fixed one.

The hypervolume of a kind is that of all its points over (KL, reward) = (--kl-limit, reward of the SFT model).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from gemma2.posttrain.evaluation.pareto import best_at, hypervolume
from gemma2.posttrain.reports.plots.figures import HUES, new_figure, styled, write_figure

GEMMA2 = str(Path(sys.executable).with_name("gemma2"))
KINDS = {"ema": "EMA anchor", "sft": "fixed anchor"}
RECIPE = {"prompts-per-step": 8, "n": 4, "mu": 0.05, "learning-rate": 3e-4, "warmup-steps": 5, "temperature": 1.0}
RECIPE |= {"max-new-tokens": 28, "eval-every": 10, "eval-prompts": 128, "save-every": 1000}


def run(source: Path, out: Path, steps: int, **chosen: Any) -> list[dict[str, Any]]:
    """One `gemma2 rlhf`; its evaluations."""
    if not (out / "gemma2.json").exists():
        policy = source / "distilled"
        fields = {"policy": policy, "sft": policy, "reward": source / "reward", "out": out, "steps": steps}
        fields |= {"prompts": source / "models" / "prompts.jsonl", "heldout": source / "models" / "heldout.jsonl"}
        words = [GEMMA2, "rlhf", "--quiet", "--force"]
        for name, value in (fields | RECIPE | chosen).items():
            if name == "mu" and chosen["anchor"] != "ema":
                continue
            words += [f"--{name}", str(value)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [row for row in rows if row.get("kind") == "eval"]


def mean_of(rows: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean over seeds and its standard error, from the spread between them."""
    values = [row[name] for row in rows]
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values)) if len(values) > 1 else math.nan


def draw(runs: dict[tuple[str, float, int], list[dict[str, Any]]], path: Path) -> None:
    """Trajectories in the plane of KL and reward: colour and marker tell the anchor, the line the beta."""
    betas = sorted({beta for _, beta, _ in runs})
    with styled():
        figure, (axis,) = new_figure(7.6, 4.8)
        for (kind, beta, seed), rows in runs.items():
            place = list(KINDS).index(kind)
            style = ("-", "--", ":", "-.")[betas.index(beta) % 4]
            label = f"{KINDS[kind]}, beta {beta:g}" if seed == min(s for _, _, s in runs) else None
            x, y = [row["kl"] for row in rows], [row["reward"] for row in rows]
            axis.plot(x, y, style, color=HUES[place], lw=1.1, alpha=0.75, marker="os"[place], ms=3, label=label)
            axis.errorbar(
                x[-1], y[-1], rows[-1]["reward_se"], rows[-1]["kl_se"], color=HUES[place], marker="os"[place], ms=7
            )
        axis.set_xlabel("KL to the SFT policy (nats per sequence)")
        axis.set_ylabel("reward on held-out prompts")
        axis.legend(frameon=False, fontsize=8.5, loc="lower right")
        for suffix in (".png", ".svg"):
            write_figure(figure, path.with_suffix(suffix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--kl-limit", type=float, default=20.0, help="nats; the hypervolume's reference point")
    parser.add_argument("--out", type=Path, default=Path("runs/anchors"))
    parser.add_argument("--figure", type=Path, default=Path("docs/anchors"), help="written as .png and .svg")
    options = parser.parse_args()
    if not options.quickstart.exists():
        words = [GEMMA2, "quickstart", "--out", str(options.quickstart)]
        subprocess.run(words, check=True)
    runs = {}
    for seed in options.seeds:
        for beta in options.betas:
            for kind in KINDS:
                out = options.out / f"{kind}-{beta:g}-{seed}"
                runs[kind, beta, seed] = run(options.quickstart, out, options.steps, anchor=kind, beta=beta, seed=seed)
                last = runs[kind, beta, seed][-1]
                print(f"{out.name}: reward {last['reward']:.3f}, KL {last['kl']:.2f}", file=sys.stderr)
    start = next(iter(runs.values()))[0]
    print(f"SFT: reward {start['reward']:.3f} ({start['reward_se']:.3f})")
    print("| anchor | beta | reward | KL | hypervolume |\n| --- | --- | --- | --- | --- |")
    reference = (options.kl_limit, start["reward"])
    for kind in KINDS:
        for beta in options.betas:
            last = [rows[-1] for (k, b, _), rows in runs.items() if (k, b) == (kind, beta)]
            areas = [
                {"area": hypervolume(rows, reference)} for (k, b, _), rows in runs.items() if (k, b) == (kind, beta)
            ]
            cells = [
                f"{mean:.3f} ({error:.3f})"
                for mean, error in (mean_of(last, "reward"), mean_of(last, "kl"), mean_of(areas, "area"))
            ]
            print(f"| {KINDS[kind]} | {beta:g} | {' | '.join(cells)} |")
    for kind in KINDS:
        points = [row for (k, _, _), rows in runs.items() if k == kind for row in rows]
        within = [(kl, best_at(points, kl)) for kl in (2, 4, 6, 8, 10)]
        best = ", ".join(f"{kl}: {point['reward']:.3f}" for kl, point in within if point)
        print(f"{KINDS[kind]}: hypervolume of all points {hypervolume(points, reference):.3f}")
        print(f"    best reward up to a KL of {best}")
    draw(runs, options.figure)


if __name__ == "__main__":
    main()
