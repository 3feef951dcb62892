"""The output of every command before it is made: its kind, its vocabulary, its size. Torch-free.

A pipeline is checked whole with these: a data set where a policy belongs, two models that cannot be merged, a teacher
with another vocabulary show in the first second, not after the first day.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import parameter_count, weight_files
from gemma2.posttrain.runs.estimates import Promise, Sources
from gemma2.posttrain.runs.inputs import paths_of
from gemma2.posttrain.schemas import (
    DistillConfig,
    FilterConfig,
    GenerateConfig,
    MergeConfig,
    PairsConfig,
    RewardConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    TinyConfig,
)
from gemma2.posttrain.schemas.config import Config

from .compile import Stage

__all__ = ["check_kinds", "look_at", "promised_by"]

POLICY, REWARD, ADAPTER, DATA, FRONT, CACHE = "policy", "reward model", "adapter", "data", "front", "cache"
NAMES = {POLICY: "a policy", REWARD: "a reward model", ADAPTER: "a LoRA adapter", DATA: "a data set"}
NAMES |= {FRONT: "a front", CACHE: "a cache of a teacher"}
# The kind of input that each field takes, by its name, and by command where commands differ.
FIELDS = {name: {POLICY} for name in ("policy", "sft", "teacher", "init", "merged", "policies", "compare", "model")}
FIELDS |= {"reward": {REWARD}, "from_head": {REWARD}, "front": {FRONT}, "fronts": {FRONT}, "teacher_cache": {CACHE}}
FIELDS |= {name: {DATA} for name in ("data", "prompts", "heldout", "eval_data", "decontaminate")}
FIELDS |= {"models": {POLICY, REWARD, ADAPTER}, "base": {POLICY, REWARD}}
SCORED = {"model": {REWARD}}  # gemma2 reward score
# The embedded models (tiny/pretrain.py), which import torch.
EMBEDDED = {
    "student": Promise(POLICY, parameters=456_288, vocabulary=512, shape=("gemma2", 96, 4)),
    "teacher": Promise(POLICY, parameters=867_360, vocabulary=512, shape=("gemma2", 160, 3)),
}
QUESTION_BYTES = 71.0  # of a row of their prompts
# Fields whose models must have one vocabulary: their distributions are compared, or their weights mixed.
TOGETHER = ("policy", "sft", "teacher", "model", "init", "merged", "policies", "compare")


def look_at(path: Path) -> Promise | None:
    """The properties of a model on disk, from config.json and headers; None if it is not a model."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or not weight_files(path):
        return None
    classifier = any("SequenceClassification" in str(name) for name in config.get("architectures") or ())
    return Promise(
        REWARD if classifier else POLICY,
        parameters=parameter_count(path),
        vocabulary=config.get("vocab_size"),
        shape=(config.get("model_type"), config.get("hidden_size"), config.get("num_hidden_layers")),
    )


def promised_by(stage: Stage, config: Config, sources: Sources) -> Iterator[tuple[Path, Promise]]:
    """(path, its future content) for the places in the output of one command that other stages may name."""
    known, out = sources.promised, stage.out

    def like(path: Path | None, kind: str | None = None) -> Promise:
        found = (known.get(path) or look_at(path)) if path is not None else None
        found = found or Promise(kind or POLICY)
        return replace(found, kind=kind) if kind else found

    if isinstance(config, TinyConfig):
        yield from ((out / name, promise) for name, promise in EMBEDDED.items())
        for name, rows in (("prompts", config.train_prompts), ("heldout", config.heldout_prompts)):
            yield out / f"{name}.jsonl", Promise(DATA, rows=rows, size=rows * QUESTION_BYTES)
    elif isinstance(config, MergeConfig):
        yield out, like(config.models[0])
    elif isinstance(config, SftConfig | DistillConfig | RlhfConfig):
        start = config.policy if isinstance(config, RlhfConfig) else config.model
        adapter = getattr(config, "lora_output", "merged") == "adapter"
        yield out, like(start, ADAPTER if adapter else POLICY)
        if isinstance(config, RlhfConfig) and config.anchor == "ema":
            yield out / "ema", like(start, POLICY)
    elif type(config) in MAKERS:
        yield out, MAKERS[type(config)](config, sources, like)
    else:
        yield out, Promise(stage.kind.makes)


Like = Callable[..., Promise]


def _generated(config: GenerateConfig, sources: Sources, like: Like) -> Promise:
    rows = min(sources.rows(config.prompts), config.limit or 10**12)
    return Promise(DATA, rows=rows * (config.best or config.n), size=rows * config.n * config.max_new_tokens * 6.0)


def _paired(config: PairsConfig, sources: Sources, like: Like) -> Promise:
    rows = min(sources.rows(config.prompts), config.limit or 10**12)
    pairs = config.n * (config.n - 1) / 2 if config.select == "all" else 1
    return Promise(DATA, rows=rows * pairs, size=rows * pairs * config.max_new_tokens * 10.0)


def _same_rows(config: FilterConfig | RewardScoreConfig, sources: Sources, like: Like) -> Promise:
    return Promise(DATA, rows=sources.rows(config.data), size=sources.size(config.data))


MAKERS: dict[type[Config], Callable[[Any, Sources, Like], Promise]] = {
    GenerateConfig: _generated,
    PairsConfig: _paired,
    FilterConfig: _same_rows,
    RewardScoreConfig: _same_rows,
    RewardConfig: lambda config, sources, like: like(config.model, REWARD),
}


def check_kinds(stage: str, config: Config, known: Mapping[Path, Promise]) -> None:
    """Refuse an input of the wrong kind, and models that do not fit each other. Raises InputError naming the stage."""
    wanted = FIELDS | (SCORED if isinstance(config, RewardScoreConfig) else {})
    seen: dict[str, list[tuple[str, Path, Promise]]] = {}
    for name in type(config).model_fields:
        for path in paths_of(config, name) if name in wanted else ():
            found = known.get(path) or look_at(path)
            if found is None:
                continue
            if found.kind not in wanted[name]:
                needed = " or ".join(NAMES[kind] for kind in sorted(wanted[name]))
                raise InputError(f"stages.{stage}: {name} {path} is {NAMES[found.kind]}", f"give {needed}")
            seen.setdefault(name, []).append((name, path, found))
    if isinstance(config, MergeConfig):
        _check_same(stage, [one for name in ("base", "models") for one in seen.get(name, [])], config.tokenizer is None)
    elif not (isinstance(config, GenerateConfig | RewardScoreConfig)):
        _check_vocabulary(stage, [one for name in TOGETHER for one in seen.get(name, [])])


Seen = list[tuple[str, Path, Promise]]


def _check_same(stage: str, models: Seen, vocabulary: bool) -> None:
    """Models that are merged have one architecture, and one vocabulary unless the merge makes one."""
    shapes = [(one, one[2].shape) for one in models if one[2].shape]
    for one, shape in shapes[1:]:
        if shape != shapes[0][1]:
            first = shapes[0][0]
            raise InputError(
                f"stages.{stage}: {one[0]} {one[1]} is {_shape(shape)}, {first[0]} {first[1]} {_shape(shapes[0][1])}",
                "merge models of one architecture",
            )
    if vocabulary:
        _check_vocabulary(stage, models)


def _shape(shape: tuple[object, ...] | None) -> str:
    kind, hidden, layers = shape or ("?", "?", "?")
    return f"{kind} of {layers} layers and width {hidden}"


def _check_vocabulary(stage: str, models: Seen) -> None:
    sizes = [(one, one[2].vocabulary) for one in models if one[2].vocabulary]
    for one, size in sizes[1:]:
        if size != sizes[0][1]:
            (role, path, _), other = sizes[0]
            raise InputError(
                f"stages.{stage}: {one[0]} {one[1]} has a vocabulary of {size}, {role} {path} one of {other}",
                "give models of one family",
            )
