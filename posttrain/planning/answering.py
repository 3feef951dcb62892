"""Memory of the commands that only run models: generate, pairs, eval, pareto, reward score and eval, cache, chat.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2.posttrain.schemas import (
    DistillCacheConfig,
    DistributionConfig,
    EvalConfig,
    GenerateConfig,
    PairsConfig,
    ParetoConfig,
    ProbeConfig,
    RewardEvalConfig,
    RewardScoreConfig,
)
from gemma2.posttrain.schemas.measures import SuiteConfig

from .activations import NetworkInUse, RowBatch, decode_bytes, sampler_logits
from .learning import CHUNK, PROMPT, Sizes, chunk_logits, decoding_copies, dtype_bytes, kernel_on, resident
from .parts import Bytes, Lengths, MemoryPlace, Moment, Sum, blocks
from .reinforcing import frozen_bytes, reading, reward_models, scoring
from .shapes import ModelShape

__all__ = [
    "answering",
    "of_cache",
    "of_chat",
    "of_eval",
    "of_generate",
    "of_pairs",
    "of_pareto",
    "of_probe",
    "of_score",
    "of_suite",
]

SHOTS = 2048  # tokens of a row of the suite with its examples, where nothing is known of the data


def answering(shape: ModelShape, base: Sum, rows: int, prompt: int, new: int, item: int, whole: bool) -> Moment:
    """Return the moment in which a model that is in `base` answers prompts."""
    network = NetworkInUse(shape, "eager", mixed=item == 2)
    parts: Sum = [
        *base,
        ("copies of weights for decoding", decoding_copies(shape, item)),
        ("KV cache", decode_bytes(shape, rows, prompt, new, item)),
        ("logits", sampler_logits(shape, rows, whole)),
        ("activations", network.forward_bytes(RowBatch(rows, prompt))),
    ]
    return Moment("generate", parts)


def of_generate(config: GenerateConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 generate`: the teacher is gone before a reward model is loaded."""
    moments: list[Moment] = []
    prompt = lengths.prompt or PROMPT
    if config.engine == "transformers":
        shape = sizes(config.teacher)
        item = int(frozen_bytes(config, place))
        whole = config.top_k == 0 and config.top_p == 1 and config.min_p == 0
        held: Sum = [("weights", resident(shape, item))]
        moments.append(answering(shape, held, config.batch_size, prompt, config.max_new_tokens, item, whole))
    elif config.engine == "vllm":
        shape = sizes(config.teacher)
        cache = Bytes(config.batch_size * shape.cache_bytes(prompt + config.max_new_tokens, 2, windowed=True))
        moments.append(Moment("generate", [("weights", resident(shape, 2)), ("KV cache", cache)]))
    if config.reward:
        batch = RowBatch(config.batch_size, prompt + config.max_new_tokens)
        networks = [reading(path, sizes, place, config.attention) for path in config.reward]
        moments.append(scoring(reward_models(config, sizes, place), networks, batch, place))
    return moments


def of_pairs(config: PairsConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 reward pairs`."""
    shape, prompt = sizes(config.model), lengths.prompt or PROMPT
    item = int(frozen_bytes(config, place))
    held: Sum = [("weights", resident(shape, item))]
    moments = [answering(shape, held, config.batch_size, prompt, config.max_new_tokens, item, True)]
    judge = Path(config.judge)
    if ":" not in config.judge:
        batch = RowBatch(config.batch_size, prompt + config.max_new_tokens)
        base: Sum = [("reward models", resident(sizes(judge), frozen_bytes(config, place)))]
        moments.append(scoring(base, [reading(judge, sizes, place, config.attention)], batch, place))
    return moments


def _measured(
    config: DistributionConfig, held: Sum, policies: Sequence[Path], sizes: Sizes, place: MemoryPlace, lengths: Lengths
) -> list[Moment]:
    """Phases of a measurement of policies next to the reference: drawn, then scored by all models."""
    prompt = lengths.prompt or PROMPT
    base = [*held, *reward_models(config, sizes, place)]
    shape = sizes(config.sft)
    drawn = max(config.n, config.batch_size // config.n * config.n)
    generate = answering(shape, base, drawn, prompt, config.max_new_tokens, 4, True)
    networks = [reading(path, sizes, place, config.attention) for path in (*config.reward, config.sft, *policies)]
    batch = RowBatch(config.batch_size, prompt + config.max_new_tokens)
    return [generate, scoring(base, networks, batch, place, both=bool(policies))]


def of_eval(config: EvalConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 eval`: the policy, the SFT policy and the reward models, in fp32."""
    held: Sum = [("reference", resident(sizes(config.sft), frozen_bytes(config, place)))]
    others = [] if config.model == config.sft else [config.model]
    held += [("weights", resident(sizes(path), frozen_bytes(config, place))) for path in others]
    return _measured(config, held, others, sizes, place, lengths)


def of_pareto(config: ParetoConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 pareto`: a line has both its ends and a model to write into in memory."""
    held: Sum = [("reference", resident(sizes(config.sft), frozen_bytes(config, place)))]
    ends = 0
    if config.merged is not None:
        ends = 2 + (config.init not in (None, config.sft))
    count = max(ends + bool(config.policies and ends), bool(config.policies))
    if count:
        held.append(("weights", resident(sizes(config.sft), frozen_bytes(config, place)) * count))
    return _measured(config, held, list(config.policies[:1]) or [config.sft], sizes, place, lengths)


def of_score(
    config: RewardScoreConfig | RewardEvalConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths
) -> list[Moment]:
    """Return the moments of `gemma2 reward score` and `reward eval`: one reward model at a time."""
    models = (config.model,) if isinstance(config, RewardScoreConfig) else config.models
    moments = []
    for path in models:
        shape = sizes(path)
        width = lengths.row or config.max_length or shape.context
        base: Sum = [("reward models", resident(shape, frozen_bytes(config, place)))]
        rows = RowBatch(config.batch_size, min(width, config.max_length or width))
        moments.append(scoring(base, [reading(path, sizes, place, config.attention)], rows, place))
    return moments


def of_probe(config: ProbeConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 reward probe`, apart from the states of the pairs, which grow with the data."""
    shape = sizes(config.model)
    base: Sum = [("weights", resident(shape, frozen_bytes(config, place)))]
    rows = RowBatch(config.batch_size, min(config.max_length, lengths.row or config.max_length))
    return [scoring(base, [reading(config.model, sizes, place, config.attention)], rows, place)]


def of_cache(config: DistillCacheConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 distill cache`: the teacher reads whole batches, on a CPU with eager attention."""
    shape = sizes(config.teacher)
    item = dtype_bytes(config.teacher_dtype, place)
    network = NetworkInUse(
        shape, "eager" if place.kind == "cpu" else kernel_on(place, config.attention), mixed=item == 2
    )
    rows = RowBatch(config.batch_size, min(config.max_length, lengths.row or config.max_length))
    chunk = min(rows.count, max(1, CHUNK // max(1, shape.vocabulary))) * shape.vocabulary * 4.0
    parts: Sum = [("teacher", resident(shape, item)), ("activations", network.forward_bytes(rows))]
    return [Moment("score", [*parts, ("logits", blocks(chunk, 3))])]


def of_suite(config: SuiteConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 eval --suite`: rows with their examples are read, then answers are written."""
    shape, item = sizes(config.model), int(dtype_bytes(config.dtype, place))
    prompt = min(lengths.prompt or SHOTS, shape.context)
    held: Sum = [("weights", resident(shape, item))]
    network = NetworkInUse(shape, "eager", mixed=item == 2)
    rows = RowBatch(config.batch_size, prompt)
    logits = chunk_logits(shape.vocabulary, rows.count, False, item == 2)
    read = Moment("score", [*held, ("activations", network.forward_bytes(rows)), ("logits", logits)])
    return [read, answering(shape, held, config.batch_size, prompt, config.max_new_tokens, item, True)]


def of_chat(shapes: Sequence[ModelShape], tokens: int, place: MemoryPlace) -> list[Moment]:
    """Return the moments of `gemma2 chat` with one or two models, when a conversation has `tokens` tokens."""
    item = 2 if place.kind == "accelerator" else 4
    held: Sum = [("weights", resident(shape, item)) for shape in shapes]
    held += [("KV cache", decode_bytes(shape, 1, tokens, 0, item)) for shape in shapes[1:]]
    widest = max(shapes, key=lambda shape: shape.parameters)
    return [answering(widest, held, 1, tokens, 0, item, False)]
