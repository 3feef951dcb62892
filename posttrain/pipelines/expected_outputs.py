"""The output of every command before it is made: its kind, its vocabulary, its size. Torch-free.

A pipeline is checked whole with these (`checks/kinds.py`): a data set where a policy belongs, two models that cannot be
merged, a teacher with another vocabulary show in the first second, not after the first day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2.posttrain.checks.front_checks import front_facts
from gemma2.posttrain.checks.kinds import (
    ADAPTER,
    DATA,
    FRONT,
    POLICY,
    REWARD,
    SEPARATE_HEAD,
    found_at,
    look_at,
    merged_kind,
)
from gemma2.posttrain.planning.estimates import Promise, Sources
from gemma2.posttrain.schemas import (
    DistillConfig,
    ExtractLoraConfig,
    FilterConfig,
    GenerateConfig,
    MergeConfig,
    PairsConfig,
    ParetoConfig,
    ReplaceTokenizerConfig,
    RewardConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    TinyConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.delivery.transfer import PullConfig

from .compile import Stage

__all__ = ["promised_by"]

# The embedded teacher, the same next to every student (tiny/pretrain.py has both, and imports torch).
TEACHER = Promise(POLICY, parameters=867_360, vocabulary=512, shape=("gemma2", 160, 3))
QUESTION_BYTES = 91.0  # of a row of their prompts


def promised_by(stage: Stage, config: Config, sources: Sources) -> Iterator[tuple[Path, Promise]]:
    """(path, its future content) for the places in the output of one command that other stages may name."""
    known, out = sources.promised, stage.out

    def like(path: Path | None, kind: str | None = None) -> Promise:
        found = (known.get(path) or look_at(path)) if path is not None else None
        return trained(found or Promise(POLICY), kind)

    if isinstance(config, TinyConfig):
        yield out / "student", embedded_student(config.width)
        yield out / "teacher", TEACHER
        for name, rows in (("prompts", config.train_prompts), ("heldout", config.heldout_prompts)):
            yield out / f"{name}.jsonl", Promise(DATA, rows=rows, size=rows * QUESTION_BYTES)
    elif isinstance(config, MergeConfig):
        first = found_at(config.models[0], known) or Promise(POLICY)
        if config.slices:  # another number of layers
            first = replace(first, shape=None, parameters=None, facts={})
        yield out, replace(first, kind=merged_kind(first) or POLICY, of=None)
    elif isinstance(config, SftConfig | DistillConfig | RlhfConfig):
        start = config.policy if isinstance(config, RlhfConfig) else config.model
        adapter = getattr(config, "lora_output", "merged") == "adapter"
        yield out, like(start, ADAPTER if adapter else POLICY)
        if isinstance(config, RlhfConfig) and config.anchor == "ema":
            yield out / "ema", like(start, POLICY)
    elif isinstance(config, ExtractLoraConfig):
        yield out, like(config.base, ADAPTER)
    elif isinstance(config, ReplaceTokenizerConfig):
        yield out, replace(like(config.model, POLICY), vocabulary=None, parameters=None)
    elif isinstance(config, PullConfig):
        yield out, Promise(config.kind)
    elif isinstance(config, ParetoConfig):
        yield out, Promise(FRONT, facts=front_facts(config, known))
    elif type(config) in MAKERS:
        yield out, MAKERS[type(config)](config, sources, like)
    else:
        yield out, Promise(stage.kind.makes)


def embedded_student(width: int) -> Promise:
    """The student of `gemma2 tiny` at a width: 4 layers, a vocabulary of 512, KV heads half as wide as the queries."""
    layers, vocabulary, feedforward = 4, 512, round(width * 8 / 3)
    layer = 3 * width * width + 3 * width * feedforward + 4 * width  # attention, MLP, norms
    parameters = vocabulary * width + layers * layer + width
    return Promise(POLICY, parameters=parameters, vocabulary=vocabulary, shape=("gemma2", width, layers))


def trained(start: Promise, kind: str | None) -> Promise:
    """The model that a training makes of its start. A stored copy of a tied output head is not written again."""
    facts = dict(start.facts)
    headed, tied = facts.pop(SEPARATE_HEAD, None), facts.get("tie_word_embeddings")
    facts.pop("num_labels", None)
    if kind != REWARD and (headed is False or tied is not None):
        facts[SEPARATE_HEAD] = bool(headed and not tied)
    return replace(start, kind=kind or start.kind, facts=facts, of=start.kind if kind == ADAPTER else None)


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
