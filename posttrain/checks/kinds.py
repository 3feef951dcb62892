"""The kind of every input: a policy where a policy belongs, a reward model where a reward model belongs. Torch-free.

An input is on disk, or promised: an earlier stage of a pipeline will make it (`runs/estimates.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import parameter_count, weight_files
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.estimates import Promise
from gemma2.posttrain.runs.inputs import paths_of
from gemma2.posttrain.schemas import (
    ConvertConfig,
    GenerateConfig,
    MergeConfig,
    PairsConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardScoreConfig,
)
from gemma2.posttrain.schemas.config import Config

__all__ = ["ADAPTER", "CACHE", "DATA", "FRONT", "POLICY", "REWARD", "Input", "check_kinds", "look_at"]

POLICY, REWARD, ADAPTER, DATA, FRONT, CACHE = "policy", "reward model", "adapter", "data", "front", "cache"
NAMES = {POLICY: "a policy", REWARD: "a reward model", ADAPTER: "a LoRA adapter", DATA: "a data set"}
NAMES |= {FRONT: "a front", CACHE: "a cache of a teacher"}
# The kind of input that each field takes, by its name, and by command where commands differ.
FIELDS = {name: {POLICY} for name in ("policy", "sft", "teacher", "init", "merged", "policies", "compare", "model")}
FIELDS |= {"reward": {REWARD}, "from_head": {REWARD}, "front": {FRONT}, "fronts": {FRONT}, "teacher_cache": {CACHE}}
FIELDS |= {name: {DATA} for name in ("data", "prompts", "heldout", "eval_data", "decontaminate")}
OF_COMMANDS: dict[type[Config], dict[str, set[str]]] = {
    RewardScoreConfig: {"model": {REWARD}},
    RewardEvalConfig: {"models": {REWARD}},
    RewardConfig: {"model": {POLICY, REWARD}},  # a reward model keeps its head and is trained further
    ProbeConfig: {"model": {POLICY, REWARD}},
    MergeConfig: {"models": {POLICY, REWARD, ADAPTER}, "base": {POLICY, REWARD}},
    PairsConfig: {"judge": {REWARD}},
}
# Fields whose models must have one vocabulary: their distributions are compared, or their weights mixed.
TOGETHER = ("policy", "sft", "teacher", "model", "init", "merged", "policies", "compare")
Input = tuple[str, Path, Promise]  # field, path, properties


def look_at(path: Path) -> Promise | None:
    """The properties of an input on disk, from its manifest, config.json and headers; None if they say nothing."""
    manifest = read_manifest(path) if path.is_dir() else None
    made = COMMANDS[manifest["command"]].makes if manifest and manifest.get("command") in COMMANDS else None
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        adapter = (path / "adapter_config.json").is_file()
        return Promise(ADAPTER) if adapter else Promise(made) if made in (DATA, FRONT, CACHE) else None
    if not isinstance(config, dict) or not weight_files(path):
        return None
    classifier = any("SequenceClassification" in str(name) for name in config.get("architectures") or ())
    return Promise(
        REWARD if classifier else POLICY,
        parameters=parameter_count(path),
        vocabulary=config.get("vocab_size"),
        shape=(config.get("model_type"), config.get("hidden_size"), config.get("num_hidden_layers")),
        tokenizer=path,
    )


def check_kinds(config: Config, known: Mapping[Path, Promise]) -> list[Input]:
    """Refuse an input of the wrong kind, and models that do not fit each other; the models that were found.

    known  what earlier stages will make, by path. Raises InputError naming the flag.
    """
    wanted = FIELDS | OF_COMMANDS.get(type(config), {})
    remote = isinstance(config, GenerateConfig) and config.engine == "openai"
    seen: dict[str, list[Input]] = {}
    for name in type(config).model_fields:
        if name not in wanted or (remote and name == "teacher") or isinstance(config, ConvertConfig):
            continue
        for path in _paths(config, name):
            found = known.get(path) or look_at(path)
            if found is None:
                continue
            if found.kind not in wanted[name]:
                raise InputError(f"{_flag(name)} {path} is {NAMES[found.kind]}", _advice(path, found, wanted[name]))
            seen.setdefault(name, []).append((name, path, found))
    if isinstance(config, MergeConfig):
        models = [one for name in ("base", "models") for one in seen.get(name, [])]
        _check_same(models, vocabulary=config.tokenizer is None)
        return models
    together = [one for name in TOGETHER for one in seen.get(name, [])]
    _check_vocabulary(together)
    return together


def _paths(config: Config, name: str) -> list[Path]:
    value = getattr(config, name, None)
    return [Path(value)] if name == "judge" and isinstance(value, str) else paths_of(config, name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _advice(path: Path, found: Promise, wanted: set[str]) -> str:
    needed = " or ".join(NAMES[kind] for kind in sorted(wanted))
    if found.kind == ADAPTER and POLICY in wanted:
        return f"make a model of it with gemma2 merge linear {path} --out MODEL"
    if found.kind == POLICY and wanted == {REWARD}:
        return f"give {needed}: gemma2 reward trains one"
    return f"give {needed}"


def _check_same(models: list[Input], vocabulary: bool) -> None:
    """Models that are merged have one architecture, and one vocabulary unless the merge makes one."""
    shapes = [(one, one[2].shape) for one in models if one[2].shape]
    for one, shape in shapes[1:]:
        if shape != shapes[0][1]:
            first = shapes[0][0]
            raise InputError(
                f"{_flag(one[0])} {one[1]} is {_shape(shape)}, {_flag(first[0])} {first[1]} {_shape(shapes[0][1])}",
                "merge models of one architecture",
            )
    if vocabulary:
        _check_vocabulary(models)


def _shape(shape: tuple[object, ...] | None) -> str:
    kind, hidden, layers = shape or ("?", "?", "?")
    return f"{kind} of {layers} layers and width {hidden}"


def _check_vocabulary(models: list[Input]) -> None:
    sizes = [(one, one[2].vocabulary) for one in models if one[2].vocabulary]
    for (role, path, _), size in sizes[1:]:
        if size != sizes[0][1]:
            (other_role, other_path, _), other = sizes[0]
            raise InputError(
                f"{_flag(role)} {path} has a vocabulary of {size}, {_flag(other_role)} {other_path} one of {other}",
                "give models of one family",
            )
