"""WARP (arXiv 2406.16768), Algorithm 1, as a sequence of the suite's own steps.

    theta_init <- theta_sft
    for i in 1..I:
        theta_m <- RL from theta_init with the EMA of theta_m as KL anchor, m = 1..M     (gemma2 rlhf)
        slerp_i <- SLERP(theta_init, {theta_m}, 1/M)                                     (gemma2 merge slerp)
        theta_init <- (1 - eta) * theta_init + eta * slerp_i                             (gemma2 merge liti)
    front: { (1 - eta) * theta_sft + eta * slerp_I }                                     (gemma2 pareto)

The policies are merged, never their anchors. LITI goes towards the init of its own iteration; the front goes from the
SFT policy to the last slerp, before LITI. Every policy, slerp and init stays on disk. The runs of an iteration differ
in their seed, which decides prompt order and samples. The paper does not say which point of the front to take:
`pick` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma2.merging.errors import InputError
from gemma2.merging.progress import SILENT, Progress
from gemma2.posttrain.evaluation.pareto import best_at, run_pareto
from gemma2.posttrain.rewards.functions import load_function
from gemma2.posttrain.rewards.terms import reward_parents
from gemma2.posttrain.rl.rlhf import run_rlhf

from .config import resolve
from .merge import run_merge
from .pipeline import Step, ensure
from .rundir import Parent, RunOptions, RunResult, open_run
from .schemas import MergeConfig, ParetoConfig, RewardFields, RlFields, RlhfConfig, TrainingFields, WarpConfig

__all__ = ["pick_eta", "run_warp", "warp_steps"]

SHARED = {*TrainingFields.model_fields, *RlFields.model_fields}


def run_seed(seed: int, iteration: int, policy: int) -> int:
    """The seed of one RL run: distinct for every run of every iteration, recorded in its manifest."""
    return seed * 10_000 + iteration * 100 + policy


def policy_step(config: WarpConfig, root: Path, init: Path, iteration: int, policy: int) -> Step:
    """One RL run from this iteration's init; optimizer and anchor start fresh."""
    shared = {name: getattr(config, name) for name in SHARED}
    rlhf = resolve(
        RlhfConfig,
        flags={
            **shared,
            "policy": init,
            "sft": config.sft,
            "prompts": config.prompts,
            "heldout": config.heldout,
            "seed": run_seed(config.seed, iteration, policy),
        },
    )
    return Step("rlhf", rlhf, root / f"iteration-{iteration}" / f"policy-{policy}", run_rlhf)


def merged_policy(config: WarpConfig, root: Path, iteration: int) -> Path:
    """Where the merge of an iteration lies: its slerp, or with M = 1 (plain RL and LITI) the policy itself."""
    return root / f"iteration-{iteration}" / ("slerp" if config.policies > 1 else "policy-1")


def warp_steps(config: WarpConfig, root: Path) -> Iterator[Step]:
    """The steps of Algorithm 1 below `root`, in order; nothing is run."""
    init = config.sft
    for iteration in range(1, config.iterations + 1):
        here = root / f"iteration-{iteration}"
        policies = [policy_step(config, root, init, iteration, m) for m in range(1, config.policies + 1)]
        yield from policies
        outs = tuple(step.out for step in policies)
        merged = merged_policy(config, root, iteration)
        if config.policies > 1:
            yield Step("merge slerp", MergeConfig(method="slerp", models=outs, base=init), merged, run_merge)
        yield Step(
            "merge liti",
            MergeConfig(method="liti", models=(merged,), base=init, etas=(config.eta,)),
            here / "init",
            run_merge,
        )
        init = here / "init"
    yield Step("pareto", front_config(config, root), root / "front", run_pareto)


def front_config(config: WarpConfig, root: Path) -> ParetoConfig:
    """The evaluation of every policy and merge, and of the line from the SFT policy to the last slerp."""
    rounds = range(1, config.iterations + 1)
    measured = [root / f"iteration-{i}" / f"policy-{m}" for i in rounds for m in range(1, config.policies + 1)]
    if config.policies > 1:
        measured += [merged_policy(config, root, i) for i in rounds]
    return ParetoConfig(
        sft=config.sft,
        prompts=config.heldout,
        policies=(*config.compare, *measured),
        merged=merged_policy(config, root, config.iterations),
        etas=config.etas,
        judge_fn=config.judge_fn,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        n=config.eval_n,
        seed=config.seed,
        **{name: getattr(config, name) for name in RewardFields.model_fields},
    )


def pick_eta(points: list[dict[str, Any]], pick: str) -> float:
    """The eta of the chosen point on the line of the front. Raises InputError when no point satisfies `pick`."""
    line = [point for point in points if point["kind"] == "line"]
    if pick.startswith("eta="):
        return float(pick[4:])
    if pick == "best-reward":
        return float(max(line, key=lambda point: point["reward"])["eta"])
    chosen = best_at(line, float(pick[4:]))
    if chosen is None:
        raise InputError(f"--pick {pick}: no point of the front has so small a KL", "raise it, or use --pick eta=0.1")
    return float(chosen["eta"])


def run_warp(config: WarpConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Run Algorithm 1 and evaluate its front; `OUT/model` is the chosen point.

    A killed run continues with `resume` at the step, and inside an RL run at the checkpoint, where it was.
    """
    for option, names in (("--reward-fn", config.reward_fn), ("--judge-fn", filter(None, [config.judge_fn]))):
        for name in names:
            load_function(name, option)  # an hour of RL later is too late for a typo
    parents = [Parent("sft", config.sft), *reward_parents(config)]
    with open_run("warp", config, options, parents=parents, data=[config.prompts, config.heldout]) as run:
        for step in warp_steps(config, run.path):
            progress.note(f"{step.command} -> {step.out.relative_to(run.path)}")
            ensure(step, progress)
        points = json.loads((run.path / "front" / "front.json").read_text(encoding="utf-8"))["points"]
        eta = pick_eta(points, config.pick)
        last = merged_policy(config, run.path, config.iterations)
        final = MergeConfig(method="liti", models=(last,), base=config.sft, etas=(eta,))
        ensure(Step("merge liti", final, run.path / "model", run_merge), progress)
        return run.finish(summarise(points, eta))


def summarise(points: list[dict[str, Any]], eta: float) -> dict[str, Any]:
    """Reward and KL of the SFT policy, the best single run and the front, for the last lines on the screen."""
    policies = [point for point in points if point["kind"] == "policy"]
    line = [point for point in points if point["kind"] == "line"]
    best = max(policies, key=lambda point: point["reward"])
    chosen = min(line, key=lambda point: abs(point["eta"] - eta))
    return {
        "model": "model",
        "eta": eta,
        "reward": chosen["reward"],
        "kl": chosen["kl"],
        "best_policy": best["name"],
        "best_policy_reward": best["reward"],
        "best_policy_kl": best["kl"],
    }
