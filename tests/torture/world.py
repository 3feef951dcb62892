"""Small jobs of every command that writes an output, each a second from a zygote, with the right bytes to expect."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from zygote import Zygote

from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.posttrain.runs.commands import output_hash
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer

JUDGE = """def judge(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]
"""
PIPELINE = """\
stages:
  sft:
    command: sft
    options: {model: MODEL, data: [sft.jsonl], max_steps: 3, batch_size: 2, save_every: 1, learning_rate: 1e-3}
  rl:
    command: rlhf
    options: {policy: "${sft.out}", prompts: prompts.jsonl, reward_fn: ["judge:judge"], steps: 2, prompts_per_step: 2,
              n: 3, max_new_tokens: 16, save_every: 1, eval_prompts: 6, warmup_steps: 0, learning_rate: 1e-3}
  merged:
    command: merge slerp
    options: {models: ["${sft.out}", "${rl.out}"]}
"""
# What differs between two runs with the same result: times, places.
VARYING = frozenset({MANIFEST, "report.html", "pipeline.json", "README.md", "commands.sh"})


@dataclass
class Job:
    """One command without --out.

    words      the command line
    resumes    whether an interrupted run continues with --resume; a pipeline goes on without it
    """

    words: tuple[str, ...]
    resumes: bool = True
    environment: dict[str, str] = field(default_factory=dict)


class World:
    """A folder with two small models, a reward model and data; and the jobs that run on them.

    models   False leaves them out, for commands that read none
    """

    def __init__(self, root: Path, models: bool = True) -> None:
        self.root = root
        _write(root)
        if models:
            _write_models(root)
        learn = ("--learning-rate", "1e-3", "--warmup-steps", "0", "--save-every", "1", "--quiet")
        short = ("--max-new-tokens", "16", "--temperature", "1")
        judged = ("--reward-fn", "judge:judge")
        rl = ("--prompts", "prompts.jsonl", *judged, "--prompts-per-step", "2", "--n", "3", "--eval-prompts", "6")
        lines = {
            "sft": ("sft", "--model", "policy", "--data", "sft.jsonl", "--max-steps", "4", "--batch-size", "2", *learn),
            "distill": (
                *("distill", "--model", "policy", "--teacher", "other", "--prompts", "prompts.jsonl", "--steps", "3"),
                *("--batch-size", "2", "--eval-prompts", "2", *short, *learn),
            ),
            "reward": (
                *("reward", "--model", "policy", "--data", "pairs.jsonl", "--max-steps", "4", "--batch-size", "2"),
                *learn,
            ),
            "rlhf": ("rlhf", "--policy", "policy", *rl, "--steps", "3", "--mu", "0.3", *short, *learn),
            "rlhf lora": (
                *("rlhf", "--policy", "policy", *rl, "--steps", "3", "--mu", "0.3", "--lora-rank", "2", *short),
                *learn,
            ),
            "generate": (
                *("generate", "--teacher", "policy", "--prompts", "prompts.jsonl", "--batch-size", "4", *short),
                *("--shard-rows", "5", "--keep-truncated", "--quiet"),
            ),
            "filter": ("filter", "sft.jsonl", "--set", "min_words=1", "--quiet"),
            "pipeline": ("pipeline", "run", "pipeline.yaml", "--quiet"),
            "merge": ("merge", "slerp", "policy", "other", "--base", "base", "--quiet"),
            "pareto": (
                *("pareto", "--policies", "policy,other", "--sft", "base", "--prompts", "prompts.jsonl", *judged),
                *(*short, "--limit", "4", "--quiet"),
            ),
            "warp": (
                *("warp", "--sft", "policy", *rl, "--heldout", "prompts.jsonl", "--policies", "2", "--iterations", "1"),
                *("--steps", "2", "--etas", "0.5,1", "--eval-limit", "4", *short, *learn),
            ),
        }
        self.jobs = {
            name: Job(words, resumes=name not in ("merge", "pareto", "pipeline")) for name, words in lines.items()
        }
        for job in self.jobs.values():
            job.environment["PYTHONPATH"] = str(root)
        self._expected: dict[str, dict[str, bytes]] = {}

    def line(self, name: str, out: Path, *more: object) -> list[str]:
        """The words of a job that writes to `out`."""
        return [*self.jobs[name].words, "--out", str(out), *map(str, more)]

    def expected(self, zygote: Zygote, name: str, *more: object, before: str = "") -> dict[str, bytes]:
        """The files of an undisturbed run, by `files_of`; made once."""
        key = " ".join([name, *map(str, more)])
        if key not in self._expected:
            out = self.root / "expected" / key.replace(" ", "-")
            run = {"folder": self.root, "environment": self.jobs[name].environment, "before": before}
            code, _, err = zygote.run(*self.line(name, out, *more), **run)
            assert code == 0, err
            self._expected[key] = files_of(out)
        return self._expected[key]


def files_of(out: Path) -> dict[str, bytes]:
    """The files of an output that have the same bytes in every run; of a manifest, what the output was made from.

    Without the card, the page, the state of a pipeline and its logs.
    """
    found: dict[str, bytes] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name == MANIFEST and (manifest := read_manifest(path.parent)):
            found[name] = output_hash({**manifest}).encode() if manifest.get("files") else b"a pipeline"
        elif path.is_file() and path.name not in VARYING and path.parent != out / "logs":
            found[name] = path.read_bytes()
    return found


def hidden(root: Path) -> list[str]:
    """What runs left behind: hidden files and folders below the root, however deep."""
    return sorted(str(path.relative_to(root)) for path in root.rglob(".*"))


def _write_models(root: Path) -> None:
    policy = random_model()
    with torch.no_grad():
        policy.model.embed_tokens.weight[107] *= 16  # it ends its turns often enough to be sampled from
    policy.save_pretrained(root / "policy")
    tiny_tokenizer().save_pretrained(root / "policy")
    for seed, name in ((1, "base"), (2, "other")):
        save_random(root / name, seed)


def _write(root: Path) -> None:
    questions = [f"What is {a} plus {b}?" for a in range(4) for b in range(3)]
    rows = {
        "prompts": [{"prompt": text} for text in questions],
        "sft": [{"prompt": text, "completion": f"It is {text[8]}."} for text in questions],
        "pairs": [{"prompt": text, "chosen": "It is 3.", "rejected": f"No {text[8]}"} for text in questions],
    }
    for name, values in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    (root / "judge.py").write_text(JUDGE, encoding="utf-8")
    (root / "pipeline.yaml").write_text(PIPELINE.replace("MODEL", "policy"), encoding="utf-8")
