"""The purpose of each command in one line, and the command line that repeats a recorded stage. Torch-free."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from gemma2.posttrain.runs.commands import COMMANDS, spell

from .collect import RecordedStage, name_of

__all__ = ["command_of", "phrases", "why"]

MERGE_FLAGS = {"etas": "eta"}  # recorded name -> flag, if they differ
DEFAULT_GRANULARITY = "layer"


def why(command: str) -> str:
    """The purpose of a command in one line; "" for an unknown command."""
    return COMMANDS[command].why if command in COMMANDS else ""


def command_of(stage: RecordedStage, root: Path) -> str:
    """The shell command that repeats a stage, with final paths relative to the parent of `root`; "" if unknown."""
    out = root.resolve() / stage.name
    if stage.command.startswith("merge ") and stage.config:
        return local(shlex.join([*merge_words(stage, out), "--out", str(out)]), root)
    if stage.command not in COMMANDS or not stage.config:
        return ""
    try:
        config = COMMANDS[stage.command].schema.model_validate(dict(stage.config))
    except ValidationError:  # written by another version; the page still shows the settings in full
        return ""
    return local(spell(stage.command, config, out), root)


def merge_words(stage: RecordedStage, out: Path) -> list[str]:
    """Words of a merge without --out: the method is a sub-command, the recorded parents are arguments and --base."""
    parents = [parent for parent in stage.manifest.get("parents") or () if isinstance(parent, Mapping)]
    places = [(parent.get("role"), os.path.normpath(out / str(parent.get("path", "")))) for parent in parents]
    words = ["gemma2", *stage.command.split(), *(path for role, path in places if role != "base")]
    words += [word for role, path in places if role == "base" for word in ("--base", path)]
    for key, value in stage.config.items():
        if key == "method" or value in (None, [], DEFAULT_GRANULARITY) or (key, value) == ("seed", 0):
            continue
        flag = MERGE_FLAGS.get(key, key.replace("_", "-"))
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
            words += [f"--{flag}", text]
    return words


def local(text: str, root: Path) -> str:
    """The text with paths below `root` relative to its parent, and without hidden names of unfinished outputs."""
    text = name_of_paths(text)
    return text.replace(f"{root.resolve().parent.as_posix().rstrip('/')}/", "")


def name_of_paths(text: str) -> str:
    """The line with `name_of` applied to each path."""
    return re.sub(r"[^\s,']+", lambda found: name_of(found[0]), text)


def phrases(command: str) -> list[str]:
    """A command line split before every flag, into pieces that should stay on one line."""
    return re.split(r" (?=--?[a-z])", command) if command else []
