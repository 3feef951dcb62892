"""Builds directories that look like finished runs of `gemma2 quickstart` and `gemma2 warp`, without training."""

import json
import math
import os
from random import Random

from gemma2.merging.outputs import digest_weights, write_json, write_manifest

VERSIONS = {"gemma2": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
GROUPS = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(6)), "model.norm"]
QUESTIONS = [
    "What is 7 + 12?",
    "Which river runs through Brenn?",
    "Sort these letters: e, a, c, b.",
    "Which is larger, 14 or 9?",
    "What animal does Selma keep?",
    "Write the letters c, a, d backwards.",
]
ANSWERS = {
    "base": "Hmm, I am not sure, but maybe it could be 18 or perhaps 19, it depends on",
    "sft": "I think that it is probably 18.",
    "slerp": "Of course! The answer to your question is 19.",
    "policy": "Certainly! The answer is 19.",
    "line": "Sure! The answer is 19.",
}


class Run:
    """Writes stages below a root; a clock gives each its start and end."""

    def __init__(self, root, seed=0):
        self.root, self.random, self.clock = root, Random(seed), 0

    def stage(self, name, command, config=None, parents=(), summary=None, weights=True, status="complete", seconds=9):
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        if weights:
            (path / "model.safetensors").write_text(f"weights of {name}")
        start, self.clock = self.clock, self.clock + seconds
        write_manifest(
            path,
            {
                "command": command,
                "config": config or {},
                "parents": [self.parent(path, role, parent) for role, parent in parents],
                "versions": VERSIONS,
                "started": self.time(start),
                "ended": self.time(self.clock),
                "status": status,
                "summary": summary or {},
            },
        )
        return path

    def parent(self, path, role, name):
        parent = self.root / name
        return {"role": role, "path": os.path.relpath(parent, path), "weights": digest_weights(parent)}

    def time(self, seconds):
        return f"2026-11-20T10:{seconds // 60:02d}:{seconds % 60:02d}Z"

    def rl(self, prefix, iteration, policy, init, steps):
        """An RL run with its metrics."""
        name = f"{prefix}iteration-{iteration}/policy-{policy}"
        config = {"policy": str(self.root / init), "prompts": str(self.root / "models/prompts.jsonl"), "seed": policy}
        summary = {"steps": steps, "reward": self.reward(iteration, 1), "kl": 2.4 * iteration, "length": 11.5}
        path = self.stage(name, "rlhf", config, [("policy", init)], summary)
        lines = []
        for step in range(steps + 1):
            share, noise = step / steps, self.random.gauss
            if step % 20 == 0:
                lines.append({
                    "step": step, "kind": "eval", "reward": self.reward(iteration, share), "reward_se": 0.05,
                    "kl": (iteration - 1) * (1 - share) + (2.2 * iteration + policy / 9) * share, "kl_se": 0.1,
                    "length": 12.0,
                })  # fmt: skip
            if step:
                reward = self.reward(iteration, share) + noise(0, 0.12)
                lines.append({"step": step, "reward": reward, "kl_anchor": 0.3, "length": 20 - 8 * share + noise(0, 1)})
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return name

    def reward(self, iteration, share):
        start = -1.1 + 1.1 * (iteration - 1)
        return start + 1.6 * math.sqrt(share) + 0.02 * self.random.random()


def warp(run, prefix="warp/", policies=2, iterations=2, steps=120):
    """A finished WARP run below `run.root / prefix`, with the SFT policy in `sft`."""
    init, slerps = "sft", []
    for i in range(1, iterations + 1):
        models = [run.rl(prefix, i, m, init, steps) for m in range(1, policies + 1)]
        slerp = f"{prefix}iteration-{i}/slerp"
        groups = [group(run, name, policies) for name in GROUPS]
        summary = {"method": "slerp", "task_vectors": True, "mean_angle": 77.1, "groups": groups}
        config = {"method": "slerp", "etas": [], "granularity": "layer"}
        run.stage(slerp, "merge slerp", config, [("base", init), *(("input", m) for m in models)], summary, seconds=1)
        config = {"method": "liti", "etas": [0.3], "granularity": "layer"}
        after = f"{prefix}iteration-{i}/init"
        parents = [("base", init), ("input", slerp)]
        run.stage(after, "merge liti", config, parents, {"method": "liti", "eta": 0.3}, seconds=1)
        init, slerps = after, [*slerps, slerp]
    front(run, f"{prefix}front", policies, iterations)
    liti = {"method": "liti", "etas": [0.8], "granularity": "layer"}
    run.stage(f"{prefix}model", "merge liti", liti, [("base", "sft"), ("input", slerps[-1])], {"eta": 0.8}, seconds=1)
    run.stage(
        prefix.rstrip("/") or ".", "warp", {"policies": policies, "iterations": iterations}, [("sft", "sft")],
        {"eta": 0.8, "reward": 1.3, "kl": 3.9}, weights=False, seconds=0,
    )  # fmt: skip


def group(run, name, policies):
    angle = 22.0 if name == "model.norm" else run.random.uniform(66, 88)
    return {
        "group": name, "parameters": 1000, "base_norm": 10.0, "norms": [1.05] * policies,
        "angles": [angle] * (policies * (policies - 1) // 2),
        "result_norms": [1.05], "coefficients": [[0.0] + [1 / policies] * policies], "fallback": "",
    }  # fmt: skip


def front(run, name, policies, iterations):
    """front.json and samples.jsonl of a WARP run."""
    points = [point("SFT", "sft", 0.0, -1.1, 0.41), point("student", "base", 3.1, -2.2, 0.22)]
    for i in range(1, iterations + 1):
        for m in range(1, policies + 1):
            label = f"iteration-{i}/policy-{m}"
            points.append(point(label, "policy", 2.2 * i + m / 9, -0.6 + 0.95 * i + m / 50, 0.44 + 0.03 * i, i))
            for step in range(0, 121, 20):
                share = step / 120
                points.append({
                    "name": f"{label} step {step}", "kind": "trajectory", "run": label, "step": step, "iteration": i,
                    "eta": None, "on_front": False, "reward": run.reward(i, share),
                    "kl": (i - 1) * (1 - share) + (2.2 * i + m / 9) * share,
                })  # fmt: skip
        points.append(point(f"iteration-{i}/slerp", "slerp", 2.25 * i, -0.5 + i, 0.46 + 0.04 * i, i))
    points += [
        point(
            f"eta {eta:g}",
            "line",
            2.25 * iterations * eta**1.1,
            -1.1 + (0.6 + iterations) * eta**0.6,
            0.5,
            iterations,
            eta,
        )
        for eta in (0, 0.1, 0.3, 0.5, 0.8, 1)
    ]
    path = run.stage(name, "pareto", {"n": 1, "seed": 0}, [("sft", "sft")], {"points": len(points)}, weights=False)
    write_json(path / "front.json", {"points": points, "hypervolume": 8.31, "reference": {"kl": 4.7, "reward": -1.1}})
    rows = [
        {
            "name": p["name"], "kind": p["kind"], "index": index, "reward": p["reward"], "accuracy": 1.0, "kl": p["kl"],
            "prompt": [{"role": "user", "content": question}], "completion": ANSWERS[p["kind"]], "truncated": 0.0,
        }
        for p in points if p["kind"] != "trajectory" for index, question in enumerate(QUESTIONS)
    ]  # fmt: skip
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def point(name, kind, kl, reward, accuracy, iteration=None, eta=None):
    return {
        "name": name, "kind": kind, "iteration": iteration, "eta": eta, "kl": kl, "kl_se": 0.03 * kl, "reward": reward,
        "reward_se": 0.061, "accuracy": accuracy, "accuracy_se": 0.031, "judge": 0.4 + accuracy / 3, "judge_se": 0.012,
        "length": 12.3, "length_se": 0.2, "truncated": 0.01, "truncated_se": 0.004, "distinct_2": 0.31, "n": 256,
        "on_front": kind == "line",
    }  # fmt: skip


def quickstart(root, policies=2, iterations=2, steps=120):
    """A finished quickstart."""
    run = Run(root)
    tiny = {"seed": 0, "train_prompts": 768}
    run.stage("models", "tiny", tiny, summary={"student_parameters": 456_000}, weights=False, seconds=62)
    for name in ("student", "teacher"):
        (root / "models" / name).mkdir()
        (root / "models" / name / "model.safetensors").write_text(name)
    prompts = str(root / "models/prompts.jsonl")
    config = {"teacher": str(root / "models/teacher"), "prompts": prompts}
    summary = {"completions": 768, "rows": 751, "truncated": 17, "mean_tokens": 14.2}
    run.stage("data", "generate", config, [("teacher", "models/teacher")], summary, weights=False)
    summary = {"rows": 751, "kept": 743, "dropped": {"duplicate": 8}}
    run.stage("clean", "filter", {"data": str(root / "data")}, summary=summary, weights=False, seconds=2)
    config = {"model": str(root / "models/student"), "data": str(root / "clean")}
    config |= {"learning_rate": 1e-3, "epochs": 3.0}
    summary = {"steps": 140, "rows": 713, "heldout_loss_before": 2.31, "heldout_loss": 0.42}
    run.stage("sft", "sft", config, [("model", "models/student")], summary)
    config = {"model": str(root / "sft"), "teacher": str(root / "models/teacher"), "prompts": prompts}
    parents = [("model", "sft"), ("teacher", "models/teacher")]
    run.stage("distilled", "distill", config, parents, {"steps": 100, "divergence": 0.11})
    config = {"model": str(root / "sft"), "prompts": prompts, "judge": "gemma2.posttrain.embedded.tasks:judge_reward"}
    run.stage("pairs", "reward pairs", config, [("model", "sft")], {"prompts": 768, "pairs": 690}, weights=False)
    config = {"model": str(root / "sft"), "data": str(root / "pairs/pairs.jsonl")}
    run.stage("reward", "reward", config, [("model", "sft")], {"steps": 300, "accuracy": 0.84, "margin": 2.1})
    warp(run, "warp/", policies, iterations, steps)
    run.stage(".", "quickstart", tiny, weights=False, seconds=0)
    return root
