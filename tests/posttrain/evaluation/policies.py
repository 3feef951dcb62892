"""Random policies laid out as two iterations of WARP, for the tests of fronts and of what is picked from them."""

import json

from gemma2.core.outputs.digests import digest_weights
from gemma2.core.progress import SILENT
from gemma2.posttrain.evaluation.trajectory import procedure
from gemma2.posttrain.schemas import ParetoConfig
from gemma2.posttrain.tiny.networks import save_random

TEXTS = ["What is 2 + 3?", "Who lives in Tolba?", "Sort c, a, b.", "Say hello."]


def reward(completions, **_):
    return [float(len(text) % 8) for text in completions]


def manifest(directory, **fields):
    (directory / "gemma2.json").write_text(json.dumps({"status": "complete", **fields}), encoding="utf-8")


def two_iterations(root):
    """base, sft, iteration-<i>/policy-1 and iteration-<i>/slerp below `root`, and four held-out prompts."""
    for seed, name in enumerate(("base", "sft")):
        save_random(root / name, seed)
    manifest(root / "sft", command="sft", parents=[{"role": "model", "weights": digest_weights(root / "base")}])
    for iteration in (1, 2):
        for seed, (name, command) in enumerate((("policy-1", "rlhf"), ("slerp", "merge slerp"))):
            path = root / f"iteration-{iteration}" / name
            save_random(path, 10 * iteration + seed)
            manifest(path, command=command)
    rows = [json.dumps({"prompt": text}) for text in TEXTS]
    (root / "heldout.jsonl").write_text("\n".join(rows), encoding="utf-8")
    alike = procedure(pareto_config(root), root / "sft", root / "heldout.jsonl", 1, 0)
    for iteration in (1, 2):
        measured_on_the_way(root / f"iteration-{iteration}" / "policy-1", alike, {2: 0.5 * iteration, 4: 1.0})
    return root


def measured_on_the_way(run, alike, kls):
    """What a run leaves of its evaluations: one at each step, with this KL on each of four prompts."""
    metrics = [
        {"step": step, "kind": "eval", "reward": 2.0, "kl": kl, "kl_se": 0.0, "kl_low": kl, "kl_high": kl, "n": 4}
        for step, kl in kls.items()
    ]
    values = [
        {"step": step, "procedure": alike, "values": {"reward": [1.0, 2.0, 2.0, 3.0], "kl": [kl] * 4}}
        for step, kl in kls.items()
    ]
    for name, rows in (("metrics.jsonl", metrics), ("evaluations.jsonl", values)):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pareto_config(root, iteration=None, **more):
    """The front of one iteration, or of the SFT policy alone."""
    fields = {
        "sft": root / "sft",
        "prompts": root / "heldout.jsonl",
        "reward_fn": "policies:reward",
        "max_new_tokens": 6,
    }
    if iteration:
        here = root / f"iteration-{iteration}"
        fields |= {"policies": (here / "policy-1", here / "slerp"), "merged": here / "slerp"}
        fields |= {"etas": (0.0, 0.5, 1.0)}
    return ParetoConfig(**(fields | more))


class Said:
    """A progress that keeps its notes and warnings."""

    def __init__(self):
        self.notes, self.warnings = [], []
        self.note, self.warn, self.task = self.notes.append, self.warnings.append, SILENT.task


def points_of(front):
    return {point["name"]: point for point in json.loads((front / "front.json").read_text())["points"]}
