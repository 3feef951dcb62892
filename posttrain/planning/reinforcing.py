"""Memory of `gemma2 rlhf`, and of `gemma2 warp`, which runs it: answers, scores, then a training step. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemma2.posttrain.schemas import RewardFields, RlFields, RlhfConfig, WarpConfig

from .activations import Network, Rows, cpu_parts
from .learning import PART_TOKENS, PROMPT, Sizes, Sum, Trained, chunk_logits, common, generating, resident, trained
from .learning import training as training_step
from .parts import Lengths, MemoryPlan, Part, Phase, Place, phase

__all__ = ["of_rlhf", "of_warp", "reading", "reward_models", "score_phase"]

KL_COPIES = 8  # of a chunk of logits: those of two models, their log-probs, their difference (evaluate.py)
CHUNK = 2**24


def reward_models(config: RewardFields, sizes: Sizes, place: Place) -> Sum:
    """The reward models of a command, in fp32; a WARM ensemble is one model."""
    paths = config.reward[:1] if config.reward_ensemble == "warm" else config.reward
    return [("reward models", resident(sizes(path), 4.0, place)) for path in paths]


def reading(path: Path, sizes: Sizes, place: Place, mixed: bool = False) -> Network:
    """Return a frozen model that scores rows, as `models/scorer.py` runs it."""
    return Network(sizes(path), "blockwise" if place.kind == "cpu" else "eager", mixed=mixed)


def score_phase(name: str, base: Sum, networks: list[Network], batch: Rows, place: Place, both: bool = False) -> Phase:
    """Return the phase in which frozen models read rows, one after the other.

    both  whether the distributions of two models are compared: then the states of both, and their logits, are there
    """
    part = cpu_parts(batch, PART_TOKENS) if place.kind == "cpu" else batch
    widest = max((network.forward_bytes(part) for network in networks), default=0.0)
    shapes = [network.shape for network in networks if not network.shape.outputs]
    logits = 0.0
    if shapes and both:
        vocabulary = shapes[0].vocabulary
        chunk = min(part.count, max(1, CHUNK // max(1, vocabulary))) * vocabulary * 4.0
        logits = KL_COPIES * chunk + 8.0 * part.count * shapes[0].hidden
    elif shapes:
        logits = chunk_logits(shapes[0].vocabulary, part.count, False, networks[0].mixed)
    return phase(name, [*base, ("activations", widest), ("logits", logits)])


def _anchor(config: RlFields, one: Trained, place: Place) -> Sum:
    """The moving average: a second model in fp32; with adapters of the weights that they are added to, or of factors.

    Its copy in the memory of the host leaves a bf16 copy on the device.
    """
    if config.anchor != "ema":
        return []
    shape, rank = one.network.shape, config.lora_rank
    if rank and config.lora_anchor == "factors":
        return [("EMA anchor", 4 * shape.adapter_parameters(rank, config.lora_targets))]
    averaged = shape.adapted_weights(config.lora_targets) if rank else shape.parameters
    if config.anchor_memory == "gpu":
        return [("EMA anchor", 4 * averaged)]
    scoring = 2 * shape.parameters
    return [("EMA anchor", scoring + (4 * averaged if place.kind == "cpu" else 0.0))]


def rl_phases(
    config: RlFields,
    policy: Path,
    reference: Path | None,
    sizes: Sizes,
    place: Place,
    lengths: Lengths,
    trainer: dict[str, object],
) -> tuple[Phase, ...]:
    """Return the phases of RL. reference: the policy that the KL is measured to, None if it is where RL starts."""
    shape = sizes(policy)
    one = trained(config, shape, place, trainer)
    network = one.network
    base = common(place)
    if reference is not None:
        base.append(("reference", resident(sizes(reference), 4.0, place)))
    elif not config.lora_rank:
        base.append(("reference", 4 * shape.parameters))
    base += reward_models(config, sizes, place) + _anchor(config, one, place)
    rows = max(1, config.prompts_per_step // place.devices) * config.n
    micro = min(config.micro_batch_size or rows, rows)
    prompt = lengths.prompt or PROMPT
    width = prompt + config.max_new_tokens
    # A group is never split, so a batch of the sampler holds at least one.
    drawn = max(config.n, micro // config.n * config.n)
    generate = generating(one, base, drawn, Lengths(None, prompt), config.max_new_tokens, True)
    if config.engine == "vllm" and config.vllm_mode == "colocate":
        generate = phase("generate", [*base, *one.state(), ("vLLM", config.vllm_memory * place.capacity)])
    scorers = [reading(path, sizes, place, network.mixed) for path in config.reward]
    scorers.append(replace(network, attention="blockwise" if place.kind == "cpu" else "eager"))
    score = score_phase("score", [*base, *one.state()], scorers, Rows(micro, width), place, both=True)
    batch = cpu_parts(Rows(micro, width), PART_TOKENS) if network.attention == "blockwise" else Rows(micro, width)
    logits = chunk_logits(shape.vocabulary, batch.rows * config.max_new_tokens, True, network.mixed)
    step = training_step(one, base, batch, logits, batch.rows < rows, place)
    return generate, score, step


def of_rlhf(config: RlhfConfig, sizes: Sizes, place: Place, lengths: Lengths) -> MemoryPlan:
    """Return the memory of `gemma2 rlhf`."""
    reference = None if config.sft in (None, config.policy) else config.sft
    return MemoryPlan(rl_phases(config, config.policy, reference, sizes, place, lengths, config.trainer))


def of_warp(config: WarpConfig, sizes: Sizes, place: Place, lengths: Lengths) -> MemoryPlan:
    """Return the memory of `gemma2 warp`: of its largest stages, an RL run from a later init."""
    # A stage that runs a network has a GPU to itself; main memory is shared.
    jobs = 1 if place.kind == "accelerator" else min(config.jobs, config.policies)
    phases = rl_phases(config, config.sft, config.sft, sizes, place, lengths, config.trainer)
    if jobs == 1:
        return MemoryPlan(phases)
    return MemoryPlan(
        tuple(Phase(one.name, tuple(Part(part.name, part.bytes * jobs) for part in one.parts)) for one in phases)
    )
