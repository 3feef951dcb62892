"""What each command does, in one line, and the command line that repeats a recorded stage. Torch-free."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from gemma2.posttrain.config import Config
from gemma2.posttrain.pipeline import spell
from gemma2.posttrain.schemas import (
    DistillConfig,
    FilterConfig,
    GenerateConfig,
    PairsConfig,
    ParetoConfig,
    RewardConfig,
    RlhfConfig,
    SftConfig,
    TinyConfig,
    WarpConfig,
)

from .collect import Stage, name_of

__all__ = ["command_of", "phrases", "why"]

COMMANDS: dict[str, tuple[type[Config], str]] = {
    "tiny": (TinyConfig, "pre-trains a small Gemma 2 student and a larger teacher from scratch"),
    "generate": (GenerateConfig, "lets the teacher answer the training prompts"),
    "filter": (FilterConfig, "drops the rows that a model should not learn from, each with its reason"),
    "distill": (DistillConfig, "teaches the student the teacher's distribution on the student's own answers"),
    "sft": (SftConfig, "teaches the student the teacher's answers, with the loss on the model's turns only"),
    "reward pairs": (PairsConfig, "samples several answers per prompt and keeps a better and a worse one"),
    "reward": (RewardConfig, "learns those preferences: a Bradley-Terry reward model"),
    "rlhf": (RlhfConfig, "RL on the reward, held near a moving average of the policy itself"),
    "pareto": (
        ParetoConfig,
        "measures every policy and the line from SFT to the last SLERP on the same held-out prompts",
    ),
    "warp": (WarpConfig, "RL runs, SLERP of their policies, a step back towards the init; repeated"),
}
MERGES = {
    "slerp": "merges the RL policies: spherical interpolation of their task vectors, one angle per layer",
    "liti": "goes back part of the way towards the init: linear interpolation",
    "linear": "averages weights",
    "ema": "averages checkpoints with exponentially falling weights",
    "warp": "SLERP and LITI in one combination",
}
MERGE_FLAGS = {"etas": "eta"}  # recorded name -> flag, where they differ
DEFAULT_GRANULARITY = "layer"


def why(command: str) -> str:
    """One line on what a command is for."""
    if command.startswith("merge "):
        return MERGES.get(command.removeprefix("merge "), "merges weights")
    return COMMANDS[command][1] if command in COMMANDS else ""


def command_of(stage: Stage, root: Path) -> str:
    """The shell command that repeats a stage, with paths as they are called below `root`; "" when it is not known."""
    out = root.resolve() / stage.name
    if stage.command.startswith("merge ") and stage.config:
        return local(shlex.join([*merge_words(stage, out), "--out", str(out)]), root)
    if stage.command not in COMMANDS:
        return ""
    try:
        config = COMMANDS[stage.command][0].model_validate(dict(stage.config))
    except ValidationError:  # written by another version: the settings are still shown in full
        return ""
    return local(spell(stage.command, config, out), root)


def merge_words(stage: Stage, out: Path) -> list[str]:
    """A merge takes its models as arguments, its method as a command, and records both as parents."""
    parents = [parent for parent in stage.manifest.get("parents") or () if isinstance(parent, Mapping)]
    places = [(parent.get("role"), os.path.normpath(out / str(parent.get("path", "")))) for parent in parents]
    words = ["gemma2", *stage.command.split(), *(path for role, path in places if role != "base")]
    words += [word for role, path in places if role == "base" for word in ("--base", path)]
    for key, value in stage.config.items():
        if key == "method" or value in (None, [], DEFAULT_GRANULARITY):
            continue
        text = ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
        words += [f"--{MERGE_FLAGS.get(key, key)}", text]
    return words


def local(text: str, root: Path) -> str:
    """Paths below the directory lose what comes before its name, and the hidden names of work in progress."""
    text = name_of_paths(text)
    return text.replace(f"{root.resolve().parent.as_posix().rstrip('/')}/", "")


def name_of_paths(text: str) -> str:
    """`name_of` for every path in a line."""
    return re.sub(r"[^\s,']+", lambda found: name_of(found[0]), text)


def phrases(command: str) -> list[str]:
    """A command line cut in front of every flag: pieces that should not be broken over lines."""
    return re.split(r" (?=--?[a-z])", command) if command else []
