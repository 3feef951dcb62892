"""Reads a finished output of `gemma2 warp` or `gemma2 quickstart` into plain records, for the report. Torch-free.

Every gemma2.json below the directory is a stage; a hidden `.NAME.partial` with a run.json is one that did not finish.
What is missing or unreadable becomes a gap with a sentence, never an exception: a report of a failed run is needed
most.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gemma2.merging.errors import InputError
from gemma2.merging.outputs import MANIFEST, digest_weights, read_manifest, weight_files

__all__ = ["Collected", "Stage", "collect", "name_of"]

PARTIAL = re.compile(r"(^|/)\.([^/]+)\.partial(?=/|$)")
# Commands in the order of the work, and what a finished quickstart holds.
WORK = (
    *("tiny", "generate", "filter", "sft", "distill", "reward pairs", "reward"),
    *("rlhf", "merge slerp", "merge liti", "pareto", "warp"),
)
QUICKSTART = ("models", "data", "clean", "sft", "distilled", "pairs", "reward", "warp")


@dataclass(frozen=True)
class Stage:
    """One command's output. `name` is its path below the report's directory; "." is the directory itself."""

    name: str
    path: Path
    manifest: Mapping[str, Any]
    weights: str | None = None  # "blake3:..." of its own weights

    @property
    def command(self) -> str:
        return str(self.manifest.get("command", ""))

    @property
    def status(self) -> str:
        return str(self.manifest.get("status", "unfinished"))

    @property
    def summary(self) -> Mapping[str, Any]:
        found = self.manifest.get("summary")
        return found if isinstance(found, Mapping) else {}

    @property
    def config(self) -> Mapping[str, Any]:
        found = self.manifest.get("config")
        return found if isinstance(found, Mapping) else {}

    @property
    def iteration(self) -> int | None:
        found = re.search(r"(?:^|/)iteration-(\d+)(?:/|$)", self.name)
        return int(found[1]) if found else None

    @property
    def seconds(self) -> float | None:
        """From start to end, where both are recorded."""
        try:
            ends = [datetime.fromisoformat(str(self.manifest[key])) for key in ("started", "ended")]
        except (KeyError, ValueError):
            return None
        return (ends[1] - ends[0]).total_seconds()


@dataclass(frozen=True)
class Collected:
    """Everything that the report shows, and the gaps: what is missing, in sentences."""

    root: Path
    stages: Sequence[Stage]
    front: Mapping[str, Any]  # front.json, or empty
    samples: Sequence[Mapping[str, Any]]  # samples.jsonl of the front
    curves: Mapping[str, Sequence[Mapping[str, Any]]]  # RL run -> metrics.jsonl with "iteration"
    merges: Mapping[str, Stage]  # name -> SLERP stage
    gaps: Sequence[str] = field(default_factory=tuple)

    def find(self, *commands: str) -> Stage | None:
        """The first stage of one of these commands."""
        return next((stage for stage in self.stages if stage.command in commands), None)


def name_of(text: str) -> str:
    """A path as it is called once complete: `a/.warp.partial/b` is `a/warp/b`."""
    return PARTIAL.sub(r"\1\2", text)


def collect(root: Path) -> Collected:
    """Read the directory. Raises InputError when no gemma2 command wrote anything into it."""
    if not root.is_dir():
        raise InputError(f"{root} is not a directory", "give the output of gemma2 warp or gemma2 quickstart")
    gaps: list[str] = []
    stages = sorted(find_stages(root, gaps), key=order)
    if not stages:
        raise InputError(f"{root} holds no output of a gemma2 command", "give the output of gemma2 warp or quickstart")
    gaps += [f"{s.name} did not finish (status {s.status})" for s in stages if s.status != "complete"]
    gaps += missing_stages(stages)
    fronts = [stage for stage in stages if (stage.path / "front.json").is_file()]
    if not fronts:
        gaps.append("there is no front: no policy was measured (gemma2 pareto)")
    front = read_front(fronts[-1].path, gaps) if fronts else {}
    return Collected(
        root=root,
        stages=stages,
        front=front,
        samples=read_lines(fronts[-1].path / "samples.jsonl", gaps) if fronts else [],
        curves={stage.name: read_curve(stage, gaps) for stage in stages if stage.command == "rlhf"},
        merges={stage.name: stage for stage in stages if "slerp" in stage.command},
        gaps=gaps,
    )


def order(stage: Stage) -> tuple[str, int, str]:
    """By end, a collection after what it holds: stages read in the order of the work."""
    rank = WORK.index(stage.command) if stage.command in WORK else len(WORK)
    return str(stage.manifest.get("ended") or "~"), rank, stage.name


def find_stages(root: Path, gaps: list[str]) -> Iterator[Stage]:
    """Every directory with a manifest, and every interrupted run."""
    for folder, children, files in os.walk(root):
        path = Path(folder)
        hidden = [c for c in children if c.startswith(".") and not PARTIAL.search(c)]
        children[:] = sorted(set(children) - set(hidden) - {"checkpoints", "ema"})
        name = name_of(path.relative_to(root).as_posix())
        try:
            if MANIFEST in files:
                yield Stage(name, path, read_manifest(path) or {}, own_weights(path))
            elif "run.json" in files and PARTIAL.search(path.name):
                state = json.loads((path / "run.json").read_text(encoding="utf-8"))
                yield Stage(name, path, {**state, "status": "unfinished"} if isinstance(state, dict) else {})
        except (InputError, ValueError) as error:
            gaps.append(f"{name} cannot be read ({error})")


def own_weights(path: Path) -> str | None:
    """Digest of a stage's weights; None where it has none."""
    return digest_weights(path) if weight_files(path) else None


def missing_stages(stages: Sequence[Stage]) -> list[str]:
    """What the configuration of a quickstart or a WARP run promises and the directory does not hold."""
    names = {stage.name for stage in stages}
    missing = []
    for stage in stages:
        prefix = "" if stage.name == "." else f"{stage.name}/"
        if stage.command == "quickstart":
            missing += [f"{prefix}{name} is missing" for name in QUICKSTART if f"{prefix}{name}" not in names]
        if stage.command == "warp":
            wanted = expected_of_warp(stage.config)
            missing += [f"{prefix}{name} is missing" for name in wanted if f"{prefix}{name}" not in names]
    return missing


def expected_of_warp(config: Mapping[str, Any]) -> list[str]:
    """The outputs of a WARP run with this configuration."""
    iterations, policies = (config.get(key) for key in ("iterations", "policies"))
    if not isinstance(iterations, int) or not isinstance(policies, int):
        return []
    inside = [*(f"policy-{m}" for m in range(1, policies + 1)), "slerp", "init"]
    return [f"iteration-{i}/{name}" for i in range(1, iterations + 1) for name in inside] + ["front", "model"]


def read_front(directory: Path, gaps: list[str]) -> Mapping[str, Any]:
    """front.json with its usable points; empty when it cannot be read."""
    try:
        front = json.loads((directory / "front.json").read_text(encoding="utf-8"))
        points = [p for p in front["points"] if isinstance(p, dict) and {"name", "kind", "kl", "reward"} <= p.keys()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        gaps.append(f"{directory.name}/front.json cannot be read ({error})")
        return {}
    if not points:
        gaps.append(f"{directory.name}/front.json holds no point")
        return {}
    return {**front, "points": points}


def read_lines(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; torn lines are counted and left out."""
    if not path.is_file():
        gaps.append(f"{path.parent.name}/{path.name} is missing")
        return []
    rows, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    if torn:
        gaps.append(f"{path.parent.name}/{path.name} has {torn} unreadable lines")
    return rows


def read_curve(stage: Stage, gaps: list[str]) -> list[dict[str, Any]]:
    """The metrics of an RL run: a training line has `reward`, an evaluation `heldout_reward` and `kl`, so that one
    metric never mixes training with held-out prompts."""
    rows = []
    for row in read_lines(stage.path / "metrics.jsonl", gaps):
        if isinstance(row.get("step"), int):
            evaluation = row.get("kind") == "eval"
            renamed = {"heldout_reward" if evaluation and key == "reward" else key: row[key] for key in row}
            if evaluation:
                renamed.pop("length", None)
            rows.append({**renamed, "iteration": stage.iteration})
    return rows
