"""Estimates disk and tokens of a step from the headers of its inputs. Torch-free; nothing is written.

The memory of a command that runs a model is in memory.py; here is that of the others. Time does not follow from tokens:
it needs a rate that was measured (durations.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import parameter_count
from gemma2.posttrain.data.sources import count_rows, data_files
from gemma2.posttrain.provenance.named_inputs import holds_results
from gemma2.posttrain.runs.generation_budget import generate_budget
from gemma2.posttrain.schemas import (
    DistillCacheConfig,
    DistillConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    MergeConfig,
    PairsConfig,
    ParetoConfig,
    PickConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import ChoicesConfig, PerplexityConfig, QaConfig, SuiteConfig, WinRateConfig

__all__ = ["GIB", "Promise", "Sources", "Work", "estimate"]

GIB = 2.0**30
FILTER_SECONDS = 7e-4  # CPU time of a row of 120 words, default filters (bench/filter.py)
LORA_SHARE = 0.05  # an adapter has a few per cent of the gradients and moments
CONTEXT = 8192  # tokens of Gemma 2
CHECKPOINTS_AT_ONCE = 3  # two are kept while the next one is written

Shape = tuple[str | None, int | None, int | None]  # model type, hidden size, layers, as config.json has them


@dataclass(frozen=True)
class Work:
    """Bytes of disk, tokens, and further figures for a plan.

    memory  bytes, of a command that runs no model; None: `memory_of` has it
    tokens  that are trained on, read or drawn; drawn ones at most
    """

    disk: float
    tokens: float
    memory: float | None = None
    facts: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Promise:
    """The known properties of an output that is not made yet.

    kind       policy, reward model, adapter, data, front, cache
    shape      model type, width and depth
    facts      what its config.json states of its function (`merging/inputs/architecture.py`), and whether it stores a
               separate output head
    of         of an adapter: the kind of model that it was trained on
    rows       upper bound for data; `size` in bytes
    tokenizer  model directory on disk whose tokenizer it has
    """

    kind: str
    parameters: int | None = None
    vocabulary: int | None = None
    shape: Shape | None = None
    rows: float | None = None
    size: float | None = None
    tokenizer: Path | None = None
    facts: Mapping[str, object] = field(default_factory=dict, compare=False)
    of: str | None = None


class Sources:
    """The inputs of a step: on disk, or promised by an earlier step. Unknown figures are NaN.

    places   the directories of steps; an input in one of them that is not promised is unknown
    counted  rows of data sets that were counted before
    tokens   tokens per row, where rows were rendered
    """

    def __init__(self, promised: Mapping[Path, Promise] | None = None, places: Sequence[Path] = ()) -> None:
        self.promised = {} if promised is None else promised  # not a copy: the caller adds to it
        self.places = places
        self.counted: dict[Path, int] = {}
        self.tokens: dict[Path, float] = {}

    def promise(self, path: Path) -> Promise | None:
        """The output that an earlier step makes at this path; None for an input on disk."""
        if path in self.promised:
            return self.promised[path]
        return Promise("unknown") if any(path.is_relative_to(place) for place in self.places) else None

    def parameters(self, path: Path | None) -> float:
        """Number of parameters of a model; 0 without a model."""
        if path is None:
            return 0.0
        made = self.promise(path)
        return _known(made.parameters) if made else parameter_count(path)

    def rows(self, path: Path) -> float:
        """Number of rows of a data set."""
        made = self.promise(path)
        if made:
            return _known(made.rows)
        if path not in self.counted:
            self.counted[path] = count_rows(path)
        return self.counted[path]

    def size(self, path: Path) -> float:
        """Bytes of a data set."""
        made = self.promise(path)
        return _known(made.size) if made else sum(file.stat().st_size for file in data_files(path))

    def mean_tokens(self, path: Path, limit: int) -> float:
        """Tokens per row: as rendered, or at the usual four bytes per token; the limit if the size is unknown."""
        if path in self.tokens:
            return min(self.tokens[path], limit)
        made = self.promise(path)
        if made and made.size is None:
            return limit
        return min(self.size(path) / max(1.0, self.rows(path)) / 4, limit)


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _train(n: float, tokens: float, lora: int) -> Work:
    state = LORA_SHARE if lora else 1.0
    checkpoint = 12.0 * state  # trained weights and their moments
    return Work(disk=n * (4 + checkpoint * CHECKPOINTS_AT_ONCE), tokens=tokens)


def _sft(config: SftConfig, sources: Sources) -> Work:
    rows = [sources.rows(path) for path in config.data]
    steps = config.max_steps or sum(rows) * config.epochs / config.batch_size
    weights = config.weights or rows
    means = [
        sources.mean_tokens(path, config.max_length) * weight for path, weight in zip(config.data, weights, strict=True)
    ]
    tokens = steps * config.batch_size * sum(means) / sum(weights)
    return _train(sources.parameters(config.model), tokens, config.lora_rank)


def _distill(config: DistillConfig, sources: Sources) -> Work:
    """Student in training, and its teacher: the teacher scores every token, the student also generates its own."""
    tokens = config.steps * config.batch_size * (config.max_new_tokens if config.teacher else config.max_length)
    return _train(sources.parameters(config.model), tokens, config.lora_rank)


def _distill_cache(config: DistillCacheConfig, sources: Sources) -> Work:
    rows = min(sources.rows(config.data), config.limit or 10**12)
    tokens = rows * sources.mean_tokens(config.data, config.max_length)
    return Work(disk=tokens * (6.0 * config.top_k + 7), tokens=tokens)


def _reward(config: RewardConfig, sources: Sources) -> Work:
    pairs = sources.rows(config.data)
    steps = config.max_steps or pairs * config.epochs / config.batch_size
    tokens = steps * config.batch_size * sources.mean_tokens(config.data, 2 * config.max_length)
    return _train(sources.parameters(config.model), tokens, config.lora_rank)


def _generate(config: GenerateConfig, sources: Sources) -> Work:
    """With a server only the rows on disk count."""
    rows = sources.rows(config.prompts) if sources.promise(config.prompts) else None
    facts = generate_budget(config) if rows is None else {}
    drawn = (rows or 0.0) * config.n * (2 * config.turns - 1) * config.max_new_tokens
    tokens = facts.get("drawn_tokens_at_most", drawn)
    return Work(disk=tokens * 6.0, tokens=tokens, facts=facts)


def _filter(config: FilterConfig, sources: Sources) -> Work:
    rows = sources.rows(config.data)
    size = sources.size(config.data)
    for path in config.decontaminate:
        sources.rows(path)
    # The results of the scan are on disk next to the output; comparing rows takes 250 bytes of memory per row.
    minutes = rows * FILTER_SECONDS / 60
    return Work(memory=rows * 250.0 + 4e8, disk=size * 2.0, tokens=0.0, facts={"cpu_minutes_about": round(minutes, 1)})


def _probe(config: ProbeConfig, sources: Sources) -> Work:
    pairs, n = sources.rows(config.data), sources.parameters(config.model)
    tokens = pairs * sources.mean_tokens(config.data, 2 * config.max_length)
    return Work(disk=4.0 * n, tokens=tokens)


def _score(config: RewardScoreConfig, sources: Sources) -> Work:
    rows, size = sources.rows(config.data), sources.size(config.data)
    share = min(rows, config.limit or rows) / rows
    return Work(disk=share * (size + 40.0 * rows), tokens=share * size / 4)


def _pairs(config: PairsConfig, sources: Sources) -> Work:
    prompts = min(sources.rows(config.prompts), config.limit or 10**12)
    tokens = prompts * config.n * config.max_new_tokens
    facts = {}
    if config.judge_model is not None:
        asked = prompts * config.n * (config.n - 1 if config.judge_style == "compare" else 1)
        facts = {"judge_requests": asked, "judge_tokens_at_most": asked * config.judge_tokens}
    return Work(disk=tokens * 6.0, tokens=tokens, facts=facts)


def _rl(n: float, steps: int, config: RlhfConfig | WarpConfig) -> Work:
    """Every token is generated, scored and trained on. On disk: the policy and its anchor, and in every checkpoint both
    and the moments.
    """
    tokens = steps * config.prompts_per_step * config.n * config.max_new_tokens
    adapter = LORA_SHARE if config.lora_rank else 1.0
    kept = _anchor_bytes(config)
    return Work(disk=n * (4.0 + kept + (12.0 * adapter + kept) * CHECKPOINTS_AT_ONCE), tokens=tokens)


def _anchor_bytes(config: RlhfConfig | WarpConfig) -> float:
    """Bytes of the EMA per parameter of the policy, in fp32; an adapter's share if it averages the factors."""
    if config.anchor != "ema":
        return 0.0
    return 4.0 * (LORA_SHARE if config.lora_rank and config.lora_anchor == "factors" else 1.0)


def _rlhf(config: RlhfConfig, sources: Sources) -> Work:
    sources.rows(config.prompts)
    return _rl(sources.parameters(config.policy), config.steps, config)


def _warp(config: WarpConfig, sources: Sources) -> Work:
    sources.rows(config.prompts)
    sources.rows(config.heldout)
    n = sources.parameters(config.sft)
    steps = sum(config.steps_of(i) for i in range(1, config.iterations + 1))
    all_iterations = _rl(n, steps, config)
    kept = config.iterations * (2 * config.policies + 2) * n * 4.0 + n * 4.0
    return Work(
        disk=kept + n * 16.0 * CHECKPOINTS_AT_ONCE,
        tokens=all_iterations.tokens * config.policies,
    )


def _pareto(config: ParetoConfig, sources: Sources) -> Work:
    rows = min(sources.rows(config.prompts), config.limit or 10**12)
    points = len(config.policies) + (len(config.etas) if config.merged else 0) + 1
    tokens = points * rows * config.n * config.max_new_tokens
    return Work(disk=1e6, tokens=tokens)


def _eval(config: EvalConfig, sources: Sources) -> Work:
    """Every prompt is answered n times."""
    rows = min(sources.rows(config.prompts), config.limit or 10**12)
    return Work(disk=0.0, tokens=rows * config.n * config.max_new_tokens)


def _reward_eval(config: RewardEvalConfig, sources: Sources) -> Work:
    """One reward model after the other reads both sides of every pair."""
    rows = min(sources.rows(config.data), config.limit or 10**12)
    limit = config.max_length or CONTEXT
    tokens = len(config.models) * rows * sources.mean_tokens(config.data, 2 * limit)
    return Work(disk=0.0, tokens=tokens)


def _merge(config: MergeConfig, sources: Sources) -> Work:
    """A stream: blocks of a few megabytes per model; its time depends on the disk, not on the processor."""
    n = sources.parameters(config.models[0])
    return Work(memory=2.0e8, disk=4.0 * n, tokens=0.0)


def _pick(config: PickConfig, sources: Sources) -> Work:
    return Work(memory=2.0e8, disk=math.nan, tokens=0.0)


def _perplexity(config: PerplexityConfig, sources: Sources) -> Work:
    size = sum(sources.size(path) for path in config.perplexity)
    return _forward(config.model, config.against, size / 4, {"tokens_about": round(size / 4)}, sources)


def _questions(config: QaConfig | ChoicesConfig, sources: Sources) -> Work:
    """Every shot is about as long as a question; the choices of one are about as long as the question."""
    path = config.qa if isinstance(config, QaConfig) else config.choices
    total = sources.rows(path)
    rows = min(total, config.limit or total)
    tokens = sources.size(path) / 4 * rows / max(total, 1) * (1 + config.shots)
    facts: JsonObject = {"questions": rows, "prompt_tokens_about": round(tokens)}
    if isinstance(config, QaConfig):
        facts["drawn_tokens_at_most"] = rows * config.max_new_tokens
        tokens += rows * config.max_new_tokens
    return _forward(config.model, config.against, tokens, facts, sources)


def _win_rate(config: WinRateConfig, sources: Sources) -> Work:
    total = sources.rows(config.prompts)
    rows = min(total, config.limit or total)
    facts: JsonObject = {"prompts": rows, "drawn_tokens_at_most": 2 * rows * config.max_new_tokens}
    if config.judge_model is not None:
        facts |= {"judge_requests": 2 * rows, "judge_tokens_at_most": 2 * rows * config.judge_tokens}
    return _forward(config.model, config.win_rate, rows * config.max_new_tokens, facts, sources)


def _forward(model: Path, other: Path | None, tokens: float, facts: JsonObject, sources: Sources) -> Work:
    """Two models, one after the other; samples of about six bytes a token on disk."""
    sizes = [sources.parameters(path) for path in (model, other) if path is not None]
    return Work(tokens * 6.0 * len(sizes), tokens * len(sizes), 4.0 * max(sizes), facts)


def _suite(config: SuiteConfig, sources: Sources) -> Work:
    """The model, and samples with their prompts; the plan of the suite adds its tokens."""
    other = config.against if config.against is not None and not holds_results(config.against) else None
    models = 1 if other is None else 2
    return Work(disk=30.0 * sources.size(config.data) * models, tokens=0.0)  # a prompt repeats its examples


# Any: each function takes the configuration of its key.
ESTIMATES: dict[type[Config], Callable[[Any, Sources], Work]] = {
    SftConfig: _sft,
    DistillConfig: _distill,
    DistillCacheConfig: _distill_cache,
    RewardConfig: _reward,
    FilterConfig: _filter,
    GenerateConfig: _generate,
    PairsConfig: _pairs,
    ProbeConfig: _probe,
    RewardScoreConfig: _score,
    RlhfConfig: _rlhf,
    WarpConfig: _warp,
    ParetoConfig: _pareto,
    EvalConfig: _eval,
    RewardEvalConfig: _reward_eval,
    MergeConfig: _merge,
    PickConfig: _pick,
    PerplexityConfig: _perplexity,
    QaConfig: _questions,
    ChoicesConfig: _questions,
    WinRateConfig: _win_rate,
    SuiteConfig: _suite,
}


def estimate(config: Config, sources: Sources) -> Work | None:
    """Estimate the needs of a step; None for a command with negligible needs."""
    found = ESTIMATES.get(type(config))
    return found(config, sources) if found else None
