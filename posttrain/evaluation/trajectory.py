"""What an RL run measured on the way, where it was measured as the points of a front are. Torch-free.

An evaluation during RL belongs on a front only if it differs from a point's measurement in nothing but the policy: the
same prompts, rewards, sampling, seed and arithmetic, and so the same random numbers. `rlhf` records with every
evaluation the digest of all that (`procedure`) and the values per prompt, in evaluations.jsonl; an evaluation with
another digest, or of another number of prompts, is not a point of the front.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gemma2.core.json_files import JsonObject, parse_json
from gemma2.core.outputs.hashing import digest_file, digest_name, hasher
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.model_identity import digest_model
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.provenance.code import code_of
from gemma2.posttrain.provenance.recorded_files import changed_files
from gemma2.posttrain.runs.run_directory import EVALUATIONS
from gemma2.posttrain.schemas import ParetoConfig, RewardFields, RlhfConfig
from gemma2.posttrain.schemas.fields import CallFields, RowFields

__all__ = ["procedure", "trajectory"]

Measuring = ParetoConfig | RlhfConfig

METRICS = "metrics.jsonl"
COLUMNS = ("reward", "kl", "length", "truncated")
PARTS = ("", "_se", "_low", "_high")
# Without the rewards, which are files (their digests count), and without what decides nothing.
SETTINGS = {*RewardFields.model_fields, *RowFields.model_fields} - {"reward", *CallFields.model_fields}


def procedure(config: Measuring, sft: Path, prompts: Path, n: int, seed: int, dtype: object = "float32") -> str:
    """The digest of all that decides a measurement, but the policy and the number of prompts.

    dtype: torch's, to which the weights of the policies are rounded (`models/precision.py`).
    """
    settings = config.model_dump(mode="json", include=SETTINGS - {"dtype"})
    if settings.get("attention") == "auto":
        del settings["attention"]  # digests from before the setting existed stay what they are
    rounded = str(dtype).removeprefix("torch.")
    if rounded != "float32":  # and those of fp32
        settings["dtype"] = f"weights in {rounded}"  # before, RL measured its policy under autocast
    content = {
        **settings,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "n": n,
        "seed": seed,
        "half": False,  # autocast, once; kept for the digests of fp32
        "sft": digest_model(sft),
        "prompts": [digest_file(path) for path in data_files(prompts)],
        "reward": [digest_model(path) for path in config.reward],
        "code": {name: digest for name, digest in code_of(config).items() if name in config.reward_fn},
    }
    digest = hasher()
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest_name(digest)


def trajectory(
    path: Path, iteration: int | None, alike: str, prompts: int, progress: Progress = SILENT
) -> list[JsonObject]:
    """The evaluations of an RL run that were made by the procedure `alike` on `prompts` prompts, as points are.

    Each has figures, and under `values` the values per prompt; a name it gets later.

    The last evaluation is left out: its weights are the policy, which is a point. So is that of the SFT policy. None of
    a run whose files were changed after it wrote them, with a warning.
    """
    changed = changed_files(path, (EVALUATIONS, METRICS))
    if changed:
        progress.warn(f"{path / changed[0]} is not the file that its run wrote: its evaluations are not on the front")
        return []
    figures = {row["step"]: row for row in _rows(path / METRICS) if row.get("kind") == "eval"}
    labels = {"kind": "trajectory", "iteration": iteration, "eta": None, "on_front": False}
    summary = (read_manifest(path) or {}).get("summary") or {}
    last = summary.get("steps", max(figures, default=0))
    found = []
    for row in _rows(path / EVALUATIONS):
        step, values = row.get("step"), row.get("values")
        if not isinstance(values, dict) or any(len(column) != prompts for column in values.values()):
            continue
        if row.get("procedure") != alike or step == last or step not in figures or not any(values["kl"]):
            continue
        measured = {f"{name}{part}": figures[step].get(f"{name}{part}") for name in COLUMNS for part in PARTS}
        found.append({**labels, "step": step, **measured, "n": figures[step].get("n"), "values": values})
    return found


def _rows(file: Path) -> Sequence[JsonObject]:
    """The lines of a JSONL file; none without it."""
    if not file.is_file():
        return []
    return [parse_json(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
