"""What bench/compare.py runs: small command lines of every training command and of every family of merges.

Each recipe writes into a folder of its name and reads only folders of the recipes that it needs. Paths are relative to
the current directory. Options are chosen for speed and breadth: nothing that is trained here is good for anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["JUDGE", "RECIPES", "Recipe", "with_needs"]

# The module on PYTHONPATH that scores texts: the package's own functions may move between two commits.
JUDGE = '''\
"""Scores that need no model."""


def variety(completions, **columns):
    """Different words, less a fiftieth per character."""
    return [len(set(text.split())) - len(text) / 50 for text in completions]
'''

TINY = "tiny/models"
STUDENT, TEACHER = f"{TINY}/student", f"{TINY}/teacher"
PROMPTS, HELDOUT = f"{TINY}/prompts.jsonl", f"{TINY}/heldout.jsonl"
SHORT = "--max-new-tokens 12"
RL = f"--prompts {PROMPTS} --steps 3 --prompts-per-step 4 --n 4 {SHORT} --learning-rate 3e-4 --warmup-steps 1"
RL += " --mu 0.1 --eval-every 2 --eval-prompts 4"
MODELS = "sft/full distill/student rlhf/policy"  # all trained from the student


@dataclass(frozen=True)
class Recipe:
    """A few command lines; `prepare` makes further inputs in the folder that they run in."""

    covers: str
    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # path -> text
    prepare: Callable[[Path], None] | None = None


def with_needs(names: list[str]) -> list[str]:
    """These recipes and what they need, in the order of RECIPES. Raises KeyError for an unknown name."""
    wanted: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        wanted.add(name)
        left += RECIPES[name].needs
    return [name for name in RECIPES if name in wanted]


# --- inputs that are not outputs of other recipes -------------------------------------------------------------------

_DOG = "The quick brown fox jumps over the lazy dog near the river bank while the sun goes down"
_ROWS = [
    ("What is 2 + 2?", "2 + 2 is 4."),
    ("What is 2 + 2?", "2 + 2 is 4."),
    ("How can I reach you?", "Write to jane.doe@gmail.com or call +1 650 253 0000 after nine o'clock."),
    ("Who are you?", "I am ChatGPT, a language model trained by OpenAI."),
    ("Is it safe?", "As an AI language model, I cannot say whether it is safe."),
    ("Tell me.", "I'm sorry, but I can't help with that."),
    ("Say it again.", "one two three four " * 12),
    ("Wie geht es dir?", "Mir geht es heute sehr gut, und das Wetter ist auch schön, vielen Dank der Nachfrage."),
    ("Tell a story.", f"{_DOG}."),
    ("Tell me a story.", f"{_DOG} again."),
    ("Nothing?", ""),
    ("Short?", "Yes."),
]
_LINES = "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in _ROWS)

_STEPS = """\
steps:
"""
_METHODS = {
    "slerp": "models: [{a}, {b}], base: {base}, t: {{layers: [0.2, 0.5, 0.9]}}",
    "liti": "models: [{a}], base: {base}, eta: 0.3",
    "warp": "models: [{a}, {b}, {c}], base: {base}, eta: 0.4",
    "linear": "models: [{a}, {b}, {c}], weights: [0.5, 0.3, 0.4], normalize: true",
    "ema": "models: [{a}, {b}, {c}], decay: 0.7",
    "model-stock": "models: [{a}, {b}, {c}], base: {base}",
    "nuslerp": "models: [{a}, {b}], weights: [1, 3], base: {base}",
    "multislerp": "models: [{a}, {b}, {c}], weights: [1, 1, 2]",
    "karcher": "models: [{a}, {b}, {c}], base: {base}",
    "task-arithmetic": "models: [{a}, {b}], base: {base}, weights: [0.5, 0.4], scale: {{layers: [0.5, 1]}}",
    "ties": "models: [{{model: {a}, density: 0.3}}, {{model: {b}, density: {{layers: [0.2, 0.6]}}}}], base: {base}",
    "dare": "models: [{a}, {b}], base: {base}, density: 0.5, seed: 3",
    "dare-ties": "models: [{a}, {b}, {c}], base: {base}, density: 0.5, seed: 4",
    "della": "models: [{a}, {b}], base: {base}, density: 0.5, epsilon: 0.1, seed: 5",
    "della-linear": "models: [{a}, {b}], base: {base}, density: 0.6, seed: 6",
    "breadcrumbs": "models: [{a}, {b}], base: {base}, density: 0.8, gamma: 0.05",
    "breadcrumbs-ties": "models: [{a}, {b}, {c}], base: {base}, density: 0.8, gamma: 0.05",
    "passthrough": "models: [{a}], scale: 0.5, dtype: bfloat16",
}
_PLACES = dict(zip("abc", MODELS.split(), strict=True)) | {"base": STUDENT}
_STEPS += "".join(f"  {name}: {{method: {name}, {keys.format(**_PLACES)}}}\n" for name, keys in _METHODS.items())
_STEPS += "  last: {method: linear, models: [ties, karcher], weights: [0.8, 0.2]}\n"

_STACK = """\
merge_method: passthrough
slices:
- sources: [{model: sft/full, layer_range: [0, 3]}]
- sources: [{model: distill/student, layer_range: [1, 4]}]
"""
_RULES = """\
merge_method: ties
base_model: tiny/models/student
models:
- model: sft/full
  parameters: {weight: 1, density: [0.2, 0.6]}
- model: rlhf/policy
  parameters:
    weight:
    - {filter: mlp, value: 0.5}
    - {value: 0.8}
parameters: {normalize: true}
dtype: float32
out_dtype: bfloat16
"""

_PIPELINE = f"""\
resources: {{cpus: 1}}
vars: {{seed: 1}}
stages:
  best:
    command: generate
    options: {{teacher: {TEACHER}, prompts: {PROMPTS}, limit: 16, n: 3, best: 1, reward_fn: ["scores:variety"],
      max_new_tokens: 12, seed: "${{vars.seed}}"}}
  clean: {{command: filter, options: {{data: "${{best.out}}", workers: 1, min_words: 2}}}}
  lora:
    command: sft
    options: {{model: {STUDENT}, data: ["${{clean.out}}"], max_steps: 2, batch_size: 4, max_length: 64,
      learning_rate: 1e-3, lora_rank: 2, lora_dropout: 0.1, seed: "${{vars.seed}}"}}
  cache: {{command: distill cache, options: {{teacher: {TEACHER}, data: "${{best.out}}", top_k: 8, max_length: 64}}}}
  cached:
    command: distill
    options: {{model: "${{lora.out}}", teacher_cache: "${{cache.out}}", divergence: forward-kl, steps: 2,
      batch_size: 4, learning_rate: 3e-4}}
  probe: {{command: reward probe, options: {{model: "${{lora.out}}", data: reward/pairs}}}}
  rm:
    command: reward
    options: {{model: "${{lora.out}}", data: reward/pairs, from_head: "${{probe.out}}", dropout: 0.05, max_steps: 2,
      batch_size: 8, learning_rate: 1e-3, lora_rank: 2}}
  scores: {{command: reward score, options: {{model: "${{rm.out}}", data: "${{best.out}}"}}}}
  rl:
    command: rlhf
    matrix: {{seed: [1, 2]}}
    options: {{policy: "${{lora.out}}", reward: ["${{rm.out}}"], reward_fn: ["scores:variety"],
      reward_weights: [1, 0.2], prompts: {PROMPTS}, steps: 2, prompts_per_step: 2, n: 3, max_new_tokens: 12,
      learning_rate: 3e-4, warmup_steps: 1, anchor: sft, lora_rank: 2, lora_output: adapter,
      micro_batch_size: 3, eval_prompts: 2}}
  slerp: {{command: merge slerp, options: {{models: ["${{rl.out}}"], base: "${{lora.out}}"}}}}
"""

EXTRA = "<tool>"


def _with_another_token(work: Path) -> None:
    """merge-tokens/longer: rlhf/policy with an added token and its row of the embedding."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    model = work / "merge-tokens" / "longer"
    shutil.copytree(work / "rlhf" / "policy", model, ignore=shutil.ignore_patterns("ema", "gemma2.json", "*.jsonl"))
    weights = load_file(model / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = np.vstack([rows, rows[:1] + 1])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": len(rows) + 1}))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": len(rows), "content": EXTRA})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


# --- recipes --------------------------------------------------------------------------------------------------------

RECIPES = {
    "tiny": Recipe(
        "both embedded models from nothing", (f"tiny --train-prompts 64 --heldout-prompts 16 --out {TINY}",)
    ),
    "generate": Recipe(
        "our sampler, two samples",
        (f"generate --teacher {TEACHER} --prompts {PROMPTS} --n 2 --temperature 0.8 {SHORT} --out generate/data",),
        ("tiny",),
    ),
    "filter": Recipe(
        "drawn rows, and rows that the filters are for; one process and two",
        (
            f"filter generate/data --decontaminate {HELDOUT} --workers 1 --out filter/clean",
            "filter filter/rows.jsonl --all-reasons --drop-disclaimers --language en --max-refusal-share 0.2"
            " --min-words 2 --workers 2 --out filter/rows",
        ),
        ("generate",),
        {"filter/rows.jsonl": _LINES},
    ),
    "sft": Recipe(
        "all weights, in micro-batches, the best by held-out loss",
        (
            f"sft --model {STUDENT} --data filter/clean --learning-rate 1e-3 --max-steps 4 --batch-size 8"
            " --micro-batch-size 4 --max-length 64 --eval-every 2 --eval-fraction 0.1 --keep best --out sft/full",
        ),
        ("filter",),
    ),
    "distill": Recipe(
        "on-policy and fixed data, JSD",
        (
            f"distill --teacher {TEACHER} --model sft/full --prompts {PROMPTS} --data filter/clean --lambda 0.5"
            f" --divergence jsd --steps 4 --batch-size 8 {SHORT} --learning-rate 3e-4 --eval-every 2 --eval-prompts 4"
            " --max-length 64 --out distill/student",
        ),
        ("sft",),
    ),
    "reward": Recipe(
        "pairs, training, evaluation",
        (
            f"reward pairs --model distill/student --prompts {PROMPTS} --limit 32 {SHORT} --judge scores:variety"
            " --select all --out reward/pairs",
            "reward --model distill/student --data reward/pairs --learning-rate 1e-3 --max-steps 4 --batch-size 8"
            " --out reward/model",
            "reward eval reward/model --data reward/pairs --limit 64",
        ),
        ("distill",),
    ),
    "rlhf": Recipe(
        "EMA anchor, a learned reward",
        (f"rlhf --policy distill/student --reward reward/model {RL} --seed 1 --out rlhf/policy",),
        ("reward",),
    ),
    "eval": Recipe(
        "one policy; a front of policies and of a line; what the tools show",
        (
            "eval --model rlhf/policy --sft distill/student --reward reward/model"
            f" --prompts {HELDOUT} --limit 8 {SHORT}",
            "merge liti rlhf/policy --base distill/student --eta 0.5 --out eval/half",
            f"pareto --sft distill/student --reward reward/model --prompts {HELDOUT} --limit 8 {SHORT} --policies"
            " eval/half --merged rlhf/policy --etas 0,0.5,1 --judge-fn scores:variety --out eval/front",
            "diff distill/student rlhf/policy --base sft/full",
            "inspect eval/half --tensors",
            "lineage eval/half",
            "report eval/front --out eval/report.html",
        ),
        ("rlhf",),
    ),
    "merge": Recipe(
        "by flags: slerp, liti at two eta, warp, linear, ties, dare",
        (
            f"merge plan slerp sft/full rlhf/policy --base {STUDENT}",
            f"merge slerp sft/full rlhf/policy --base {STUDENT} --t 0.3 --granularity tensor --out merge/slerp",
            f"merge liti rlhf/policy --base {STUDENT} --eta 0.1,0.5 --out merge/liti",
            f"merge warp {MODELS} --base {STUDENT} --eta 0.3 --dtype bfloat16 --out merge/warp",
            "merge linear sft/full rlhf/policy --weights 0.7,0.3 --out merge/linear",
            f"merge ties {MODELS} --base {STUDENT} --density 0.2,0.4,0.6 --out merge/ties",
            f"merge dare sft/full rlhf/policy --base {STUDENT} --density 0.5 --seed 7 --out merge/dare",
        ),
        ("rlhf",),
    ),
    "merge-methods": Recipe(
        "all 18 methods as steps of one file",
        ("merge --config merge-methods/steps.yaml --out merge-methods/steps",),
        ("rlhf",),
        {"merge-methods/steps.yaml": _STEPS},
    ),
    "merge-files": Recipe(
        "mergekit's files: slices, gradients, filters",
        (
            "merge --config merge-files/stack.yaml --out merge-files/stack",
            "merge --config merge-files/rules.yaml --out merge-files/rules",
        ),
        ("rlhf",),
        {"merge-files/stack.yaml": _STACK, "merge-files/rules.yaml": _RULES},
    ),
    "merge-tokens": Recipe(
        "tokenizers that differ: their union, and that of the base",
        (
            "merge linear sft/full merge-tokens/longer --tokenizer union --out merge-tokens/union",
            f"merge task-arithmetic merge-tokens/longer --base {STUDENT} --tokenizer base --out merge-tokens/base",
        ),
        ("rlhf",),
        prepare=_with_another_token,
    ),
    "warp": Recipe(
        "M = 2 policies, I = 1 iteration, the front, the chosen model, its page",
        (
            f"warp --sft distill/student --reward reward/model --heldout {HELDOUT} {RL} --policies 2 --iterations 1"
            " --eval-limit 8 --etas 0,0.5,1 --cpus 1 --out warp/run",
            "report warp/run --out warp/report.html",
        ),
        ("reward",),
    ),
    "pipeline": Recipe(
        "stages: best of n, LoRA, the teacher cache, the probe, scores, RL by a matrix, adapters merged",
        (
            "pipeline run pipeline/stages.yaml --out pipeline/run",
            "pipeline status pipeline/run",
            "pipeline graph pipeline/run",
        ),
        ("reward",),
        {"pipeline/stages.yaml": _PIPELINE},
    ),
}
