"""Memory of `gemma2 rlhf`, and of `gemma2 warp`, which runs it: answers, scores, then a training step. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemma2.posttrain.schemas import RewardFields, RlFields, RlhfConfig, WarpConfig
from gemma2.posttrain.schemas.config import Config

from .activations import NetworkInUse, RowBatch, cpu_parts
from .learning import (
    CHUNK,
    PART_TOKENS,
    PROMPT,
    Sizes,
    Trained,
    chunk_logits,
    dtype_bytes,
    generating,
    kernel_on,
    resident,
    trained,
    training,
)
from .parts import Bytes, Lengths, MemoryPlace, Moment, Sum, blocks

__all__ = ["frozen_bytes", "of_rlhf", "of_warp", "reading", "reward_models", "scoring"]

FP32 = 4.0  # bytes of an element
KL_COPIES = 8  # of a chunk of logits: those of two models, their log-probs, their difference (evaluate.py)


def frozen_bytes(config: Config, place: MemoryPlace) -> float:
    """Return the bytes of an element of models that are not trained: --dtype, where a command has it."""
    return dtype_bytes(str(getattr(config, "dtype", "auto")), place)


def reward_models(config: RewardFields, sizes: Sizes, place: MemoryPlace) -> Sum:
    """The reward models of a command, a WARM ensemble is one model."""
    paths = config.reward[:1] if config.reward_ensemble == "warm" else config.reward
    item, share = frozen_bytes(config, place), 1 / place.shards
    return [("reward models", resident(sizes(path), item, share)) for path in paths]


def reading(path: Path, sizes: Sizes, place: MemoryPlace, asked: str, mixed: bool = False) -> NetworkInUse:
    """Return a frozen model that scores rows, as `models/scorer.py` runs it. asked: --attention."""
    return NetworkInUse(sizes(path), kernel_on(place, asked), mixed=mixed)


def scoring(base: Sum, networks: list[NetworkInUse], batch: RowBatch, place: MemoryPlace, both: bool = False) -> Moment:
    """Return the moment in which frozen models read rows, one after the other.

    both  whether the distributions of two models are compared: then the states of both, and their logits, are there
    """
    part = cpu_parts(batch, PART_TOKENS) if place.kind == "cpu" else batch
    widest = max((network.forward_bytes(part) for network in networks), key=lambda one: one.total, default=Bytes())
    shapes = [network.shape for network in networks if not network.shape.outputs]
    logits = Bytes()
    if shapes and both:
        vocabulary = shapes[0].vocabulary
        chunk = min(part.count, max(1, CHUNK // max(1, vocabulary))) * vocabulary * 4.0
        logits = blocks(chunk, KL_COPIES) + blocks(4.0 * part.count * shapes[0].hidden, 2)
    elif shapes:
        logits = chunk_logits(shapes[0].vocabulary, part.count, False, networks[0].mixed)
    return Moment("score", [*base, ("activations", widest), ("logits", logits)])


def _anchor(config: RlFields, one: Trained, place: MemoryPlace) -> Sum:
    """The moving average: a second model in fp32; with adapters of the weights that they are added to, or of factors.

    Its copy in the memory of the host leaves a bf16 copy on the device.
    """
    if config.anchor != "ema":
        return []
    shape, rank = one.network.shape, config.lora_rank
    if rank and config.lora_anchor == "factors":
        return [("EMA anchor", Bytes(4 * shape.adapter_parameters(rank, config.lora_targets) / place.shards))]
    averaged = (shape.adapted_weights(config.lora_targets) if rank else shape.parameters) / place.shards
    if config.anchor_memory == "gpu":
        return [("EMA anchor", Bytes(4 * averaged))]
    return [("EMA anchor", Bytes(2 * shape.parameters / place.shards + (4 * averaged if place.kind == "cpu" else 0.0)))]


def rl_moments(
    config: RlFields,
    policy: Path,
    reference: Path | None,
    sizes: Sizes,
    place: MemoryPlace,
    lengths: Lengths,
    trainer: dict[str, object],
) -> list[Moment]:
    """Return the moments of RL. reference: the policy that the KL is measured to, None if it is where RL starts."""
    shape = sizes(policy)
    one = trained(config, shape, place, trainer, config.attention)
    network = one.network
    base: Sum = []
    item = frozen_bytes(config, place)
    if reference is not None:
        base.append(("reference", resident(sizes(reference), item, 1 / place.shards)))
    elif not config.lora_rank:  # a copy of the policy
        base.append(("reference", resident(shape, item, 1 / place.shards)))
    # On an accelerator a whole reference is in the memory of the host but for the evaluations.
    measured = base if place.kind == "accelerator" and not place.full_shard else []
    base = [*([] if measured else base)]
    base += reward_models(config, sizes, place) + _anchor(config, one, place)
    rows = max(1, config.prompts_per_step // place.devices) * config.n
    micro = min(config.micro_batch_size or rows, rows)
    prompt = lengths.prompt or PROMPT
    width = prompt + config.max_new_tokens
    # A group is never split, so a batch of the sampler holds at least one.
    drawn = max(config.n, micro // config.n * config.n)
    generate = generating(one, base, drawn, prompt, config.max_new_tokens, place, lent=True)
    if config.engine == "vllm" and config.vllm_mode == "colocate":
        held = Bytes(config.vllm_memory * place.capacity)
        generate = Moment("generate", [*base, *one.state(), ("vLLM", held)])
    scorers = [reading(path, sizes, place, config.attention, network.mixed) for path in config.reward]
    scorers.append(replace(network, attention=kernel_on(place, config.attention)))
    passed: Sum = []
    if place.full_shard:  # what scores is lent its weights, whole (sharding/lending.py), one model after the other
        largest = max(one.shape.parameters for one in scorers)
        passed = [("gathered weights", Bytes((2 if network.mixed else 4) * largest))]
    score = scoring([*measured, *base, *one.state(), *passed], scorers, RowBatch(micro, width), place, both=True)
    batch = (
        cpu_parts(RowBatch(micro, width), PART_TOKENS) if network.attention == "blockwise" else RowBatch(micro, width)
    )
    logits = chunk_logits(shape.vocabulary, batch.rows * config.max_new_tokens, True, network.mixed)
    return [generate, score, *training(one, base, batch, logits, batch.rows < rows, place)]


def of_rlhf(config: RlhfConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 rlhf`."""
    reference = None if config.sft in (None, config.policy) else config.sft
    return rl_moments(config, config.policy, reference, sizes, place, lengths, config.trainer)


def of_warp(config: WarpConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 warp`: of its largest stages, RL from a later init, `--jobs` at a time."""
    # A stage that runs a network has a GPU to itself; main memory is shared.
    jobs = 1 if place.kind == "accelerator" else min(config.jobs, config.policies)
    moments = rl_moments(config, config.sft, config.sft, sizes, place, lengths, config.trainer)
    return [Moment(one.phase, [(name, amount * jobs) for name, amount in one.parts]) for one in moments]
