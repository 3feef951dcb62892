"""Builds directories that look like runs of `gemma2 quickstart` and `gemma2 warp`, finished or not."""

import json
import math
import os
from random import Random

from text_model import write_text_model

from gemma2.core.json_files import write_json
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import write_manifest

VERSIONS = {"gemma2": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
GROUPS = ["embed_tokens", *(f"layers.{i}" for i in range(6)), "norm"]
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
    """Writes stages below a root, and pipeline.json; a clock gives each its start and end."""

    def __init__(self, root, seed=0):
        self.root, self.random, self.clock, self.records = root, Random(seed), 0, {}

    def stage(
        self, name, command, config=None, parents=(), summary=None, weights=True, data=(), seconds=9, inside=False
    ):
        """A complete output. parents: (role, stage); data: (stage, file). inside: of another stage's output."""
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        if weights:
            write_text_model(path, f"weights of {name}")
        start, self.clock = self.clock, self.clock + seconds
        write_manifest(
            path,
            {
                "command": command,
                "config": config or {},
                "parents": [self.parent(path, role, parent) for role, parent in parents],
                "data": [{"path": os.path.relpath(self.root / s / f, path), "digest": "blake3:0"} for s, f in data],
                "versions": VERSIONS,
                "started": self.time(start),
                "ended": self.time(self.clock),
                "status": "complete",
                "summary": summary or {},
            },
        )
        if not inside:
            needs = dict.fromkeys(place.split("/")[0] if place.startswith("models/") else place
                                  for place in [*(parent for _, parent in parents), *(s for s, _ in data)])  # fmt: skip
            self.record(name, command, list(needs), "complete", seconds=seconds)
        return path

    def record(self, name, command, needs, status, error=None, seconds=None):
        """The entry of pipeline.json."""
        self.records[name] = {
            "command": command, "needs": needs, "status": status, "started": None, "ended": None, "seconds": seconds,
            "attempts": 1, "exit_code": None, "error": error,
        }  # fmt: skip

    def finish(self, status="complete"):
        """Write pipeline.json."""
        document = {"schema_version": 1, "name": self.root.name, "status": status, "stages": self.records}
        write_json(self.root / "pipeline.json", document)
        return self.root

    def parent(self, path, role, name):
        parent = self.root / name
        return {"role": role, "path": os.path.relpath(parent, path), "weights": digest_weights(parent)}

    def time(self, seconds):
        return f"2026-11-20T{10 + seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}Z"

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
    init, fronts = "sft", []
    for i in range(1, iterations + 1):
        init = iteration(run, prefix, i, init, policies, steps)
        fronts.append(f"{prefix}iteration-{i}/front")
        front(run, fronts[-1], policies, i, fronts[:-1])
    front(run, f"{prefix}front", policies, iterations, fronts, ("models/student",))
    last = f"{prefix}iteration-{iterations}/{'slerp' if policies > 1 else 'policy-1'}"
    name = f"iteration-{iterations}/eta 0.8"
    summary = {"name": name, "kind": "line", "eta": 0.8, "iteration": iterations, "reward": 1.3, "kl": 3.9}
    run.stage(
        f"{prefix}model", "pick", {"front": str(run.root / f"{prefix}front"), "pick": "best-reward"},
        [("base", "sft"), ("input", last)], summary, data=[(f"{prefix}front", "front.json")], seconds=1,
    )  # fmt: skip


def iteration(run, prefix, i, init, policies, steps):
    """The RL runs of one iteration, their SLERP (of two or more) and the next init, whose name it returns."""
    models = [run.rl(prefix, i, m, init, steps) for m in range(1, policies + 1)]
    merged = models[0]
    if policies > 1:
        merged = f"{prefix}iteration-{i}/slerp"
        groups = [group(run, name, policies) for name in GROUPS]
        summary = {"method": "slerp", "vectors": "task vectors", "mean_angle": 77.1, "groups": groups}
        config = {"method": "slerp", "seed": 0, "etas": [], "granularity": "layer"}
        run.stage(merged, "merge slerp", config, [("base", init), *(("input", m) for m in models)], summary, seconds=1)
    config = {"method": "liti", "seed": 0, "etas": [0.3], "granularity": "layer"}
    after = f"{prefix}iteration-{i}/init"
    run.stage(after, "merge liti", config, [("base", init), ("input", merged)], {"eta": 0.3}, seconds=1)
    return after


def group(run, name, policies):
    """One group of a merge as merging/engine.py records it."""
    pairs = policies * (policies - 1) // 2
    angles = [20.0 if name == "norm" else run.random.uniform(66, 88) for _ in range(pairs)]
    return {
        "group": name, "parameters": 1000, "base_norm": 10.0, "norms": [1.05] * policies, "angles": angles,
        "coefficients": [0.0] + [1 / policies] * policies, "fallback": "", "angle": sum(angles) / max(pairs, 1),
        "result_norm": 1.05,
    }  # fmt: skip


def front(run, name, policies, iterations, before=(), compared=()):
    """front.json and samples.jsonl of the iterations so far."""
    points = [point("SFT", "sft", 0.0, -1.1, 0.41)]
    points += [point("student", "base", 3.1, -2.2, 0.22)] if compared else []
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
        if policies > 1:
            points.append(point(f"iteration-{i}/slerp", "slerp", 2.25 * i, -0.5 + i, 0.46 + 0.04 * i, i))
        points += [
            point(f"iteration-{i}/eta {eta:g}", "line", 2.25 * i * eta**1.1, -1.1 + (0.6 + i) * eta**0.6, 0.5, i, eta)
            for eta in (0, 0.1, 0.3, 0.5, 0.8, 1)
        ]
    points = [gained(point) for point in points]
    parents = [("sft", "sft"), *(("policies", place) for place in compared)]
    parents += (
        [] if compared else [("policies", f"{name.removesuffix('front')}policy-{m + 1}") for m in range(policies)]
    )
    data = [(place, "front.json") for place in before]
    summary = {"points": len(points), "hypervolume": 8.31}
    path = run.stage(name, "pareto", {"n": 1, "seed": 0}, parents, summary, weights=False, data=data)
    best = [{"limit": limit, **points[-3], "chosen_from": 7, "reward_elsewhere": 0.58} for limit in (2.0, 5.0)]
    area = {
        "hypervolume": 4.0 + iterations,
        "hypervolume_low": 3.81 + iterations,
        "hypervolume_high": 4.19 + iterations,
    }
    gain = {"hypervolume_gain": 0.5, "hypervolume_gain_low": 0.4, "hypervolume_gain_high": 0.6} if before else {}
    area |= {"reference": {"kl": 4.7, "reward": -1.1}, "reference_from": "points"}
    area |= {"reference_point": f"iteration-{iterations}/policy-2"}
    write_json(path / "front.json", {"points": points, **area, **gain, "best_at": best})
    rows = [
        {
            "name": p["name"], "kind": p["kind"], "index": index, "reward": p["reward"], "accuracy": 1.0, "kl": p["kl"],
            "prompt": [{"role": "user", "content": question}], "completion": ANSWERS[p["kind"]], "truncated": 0.0,
        }
        for p in points if p["kind"] != "trajectory" for index, question in enumerate(QUESTIONS)
    ]  # fmt: skip
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def gained(point):
    """A point with what it gains over SFT (-1.1) and, if merged, over the best single run (0.39): errors 0.05, 0.8."""
    gains = {"reward_over_start": (point["reward"] + 1.1, 0.05), "judge_over_start": (0.04, 0.03)}
    if point["kind"] in ("slerp", "line"):
        gains["reward_over_single"] = (point["reward"] - 0.39, 0.8)
    if point["kind"] in ("sft", "trajectory") or point.get("eta") == 0:
        return point
    columns = {"single": "RL 1.2"}
    for key, (gain, error) in gains.items():
        columns |= {
            key: gain,
            f"{key}_se": error,
            f"{key}_low": gain - 1.96 * error,
            f"{key}_high": gain + 1.96 * error,
        }
    return point | columns


def point(name, kind, kl, reward, accuracy, iteration=None, eta=None):
    """A measured point, its intervals 1.96 standard errors wide to either side."""
    figures = {
        "kl": (kl, 0.03 * kl), "reward": (reward, 0.061), "accuracy": (accuracy, 0.031), "length": (12.3, 0.2),
        "judge": (0.4 + accuracy / 3, 0.012), "truncated": (0.01, 0.004),
    }  # fmt: skip
    columns = {}
    for key, (value, error) in figures.items():
        columns |= {key: value, f"{key}_se": error}
        columns |= {f"{key}_low": value - 1.96 * error, f"{key}_high": value + 1.96 * error}
    labels = {"name": name, "kind": kind, "iteration": iteration, "eta": eta}
    return labels | columns | {"distinct_2": 0.31, "n": 256, "on_front": kind == "line"}


def quickstart(root, policies=2, iterations=2, steps=120):
    """A finished quickstart."""
    run = Run(root)
    tiny = {"seed": 0, "train_prompts": 768}
    run.stage("models", "tiny", tiny, summary={"student_parameters": 456_000}, weights=False, seconds=62)
    for name in ("student", "teacher"):
        run.stage(f"models/{name}", "tiny", {"size": name}, inside=True, seconds=0)
    prompts = str(root / "models/prompts.jsonl")
    config = {"teacher": str(root / "models/teacher"), "prompts": prompts}
    summary = {"completions": 768, "rows": 751, "truncated": 17, "mean_tokens": 14.2}
    run.stage("data", "generate", config, [("teacher", "models/teacher")], summary, weights=False,
              data=[("models", "prompts.jsonl")])  # fmt: skip
    summary = {"rows": 751, "kept": 743, "dropped": {"duplicate": 8}}
    run.stage("clean", "filter", {"data": str(root / "data")}, summary=summary, weights=False, seconds=2,
              data=[("data", "data-00000-of-00001.jsonl")])  # fmt: skip
    config = {"model": str(root / "models/student"), "data": str(root / "clean")}
    config |= {"learning_rate": 1e-3, "epochs": 3.0}
    summary = {"steps": 140, "rows": 713, "heldout_loss_before": 2.31, "heldout_loss": 0.42}
    run.stage("sft", "sft", config, [("model", "models/student")], summary, data=[("clean", "data-0.jsonl")])
    config = {"model": str(root / "sft"), "teacher": str(root / "models/teacher"), "prompts": prompts}
    parents = [("model", "sft"), ("teacher", "models/teacher")]
    run.stage("distilled", "distill", config, parents, {"steps": 100, "divergence": 0.11})
    config = {"model": str(root / "sft"), "prompts": prompts, "judge": "gemma2.posttrain.tiny.tasks:judge_reward"}
    run.stage("pairs", "reward pairs", config, [("model", "sft")], {"prompts": 768, "pairs": 690}, weights=False)
    config = {"model": str(root / "sft"), "data": str(root / "pairs/pairs.jsonl")}
    run.stage("reward", "reward", config, [("model", "sft")], {"steps": 300, "accuracy": 0.84, "margin": 2.1},
              data=[("pairs", "pairs.jsonl")])  # fmt: skip
    warp(run, "warp/", policies, iterations, steps)
    return run.finish()


def broken(root, policies=16, iterations=5, done=2, steps=60):
    """WARP that ended in iteration `done + 1`: one run failed, one was interrupted, later stages were not started."""
    run = Run(root)
    run.stage("sft", "sft")
    run.stage("reward", "reward", {}, [("model", "sft")])
    init, fronts = "sft", []
    for i in range(1, done + 1):
        init = iteration(run, "", i, init, policies, steps)
        front(run, f"iteration-{i}/front", policies, i, fronts)
        fronts.append(f"iteration-{i}/front")
    for i in range(done + 1, iterations + 1):
        names = [f"iteration-{i}/policy-{m}" for m in range(1, policies + 1)]
        for m, name in enumerate(names, 1):
            status = "blocked" if i > done + 1 else "failed" if m == 2 else "interrupted" if m == 5 else "complete"
            if status == "complete":
                run.rl("", i, m, init, steps)
            else:
                error = "error: KL 201 nats passed --max-kl 200" if status == "failed" else None
                run.record(name, "rlhf", [init, "reward"], status, error)
        after = {"slerp": ("merge slerp", [init, *names]), "init": ("merge liti", [init, f"iteration-{i}/slerp"]),
                 "front": ("pareto", [f"iteration-{i}/slerp", *names, *fronts])}  # fmt: skip
        for name, (command, needs) in after.items():
            run.record(f"iteration-{i}/{name}", command, needs, "blocked")
        init, fronts = f"iteration-{i}/init", [*fronts, f"iteration-{i}/front"]
    run.record("front", "pareto", fronts, "blocked")
    run.record("model", "pick", ["front"], "blocked")
    half = root / f"iteration-{done + 1}" / ".policy-5.partial"
    half.mkdir()
    (half / "run.json").write_text(json.dumps({"command": "rlhf", "config": {"seed": 5}, "parents": [], "data": []}))
    (half / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    return run.finish("failed")
