"""Memory of the commands that learn from rows: sft, distill and reward. Torch-free.

A training step has two moments that may be the largest: the end of the forward pass, when every block has kept its
activations, and the end of the backward pass, when every gradient is there. Between them the ones go as the others
come. An embedding that is also the output head gets two gradients, each as large as the table (V x d).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2.posttrain.schemas import DistillConfig, LoraFields, RewardConfig, SftConfig

from .activations import Attention, Network, Rows, cpu_parts, decode_bytes, sampler_logits
from .parts import Lengths, MemoryPlan, Phase, Place, phase
from .shapes import ModelShape

__all__ = ["Sizes", "Trained", "chunk_logits", "of_distill", "of_reward", "of_sft", "resident", "trained", "training"]

Sizes = Callable[[Path], ModelShape]
Sum = list[tuple[str, float]]

PART_TOKENS = 2048  # per forward pass on a CPU (sft_trainer.py, reward_trainer.py, scorer.py)
CHUNK, ROWS, TILE = 2**24, 128, 2**22  # logits at once (cross_entropy.py, scorer.py, divergence.py)
SAMPLE = 2**16  # elements per tensor that are kept in fp64, to see how far the weights move (movement.py)
DIVERGENCE_COPIES = {"forward-kl": 5, "reverse-kl": 5, "jsd": 8}  # of a chunk of logits
PROMPT = 512  # tokens of the longest prompt where nothing is known of the data


@dataclass(frozen=True)
class Trained:
    """The weights that a command trains: bytes per device.

    weights    all of the model, fp32, adapters included
    elements   trained elements, on this device
    embedding  bytes of the gradient of the embedding; 0 if the embedding is frozen
    tied       whether the output head shares it
    records    what is kept of the start, to see how far the weights moved
    """

    network: Network
    weights: float
    elements: float
    embedding: float
    tied: bool
    records: float

    def state(self) -> Sum:
        """Weights, the optimizer's moments (Adam, fp32), and the records of the start."""
        return [("weights", self.weights), ("optimizer", 8 * self.elements), ("records of the start", self.records)]


def trained(config: LoraFields, shape: ModelShape, place: Place, mapping: Mapping[str, object]) -> Trained:
    """Return what training a model of this shape takes. `mapping`: the options under `trainer:`."""
    rank, shards = config.lora_rank, place.shards
    adapters = shape.adapter_parameters(rank, config.lora_targets) if rank else 0.0
    elements = (adapters if rank else shape.parameters) / shards
    accelerated = place.kind == "accelerator"
    checkpointing = bool(mapping.get("activation_checkpointing", accelerated))
    attention: Attention = "eager" if accelerated or checkpointing else "blockwise"
    network = Network(
        shape,
        attention,
        mixed=accelerated and bool(mapping.get("bf16", True)),
        checkpointing=checkpointing,
        trained=rank == 0,
        rank=rank,
        adapted=len(shape.adapted(config.lora_targets)) if rank else 0,
    )
    weights = 4 * (shape.parameters + adapters) / shards
    records = 0.0 if rank else 8 * _sampled(shape)
    embedding = 0.0 if rank else 4.0 * shape.embedding / shards
    return Trained(network, weights, elements, embedding, shape.tied and not shape.outputs, records)


def _sampled(shape: ModelShape) -> float:
    """Elements of all tensors, of each at most SAMPLE."""
    of_block = sum(min(inputs * outputs, SAMPLE) for inputs, outputs in shape.linear_layers().values())
    norms = 4 * min(shape.hidden, SAMPLE)
    return float(shape.layers * (of_block + norms) + min(shape.embedding, SAMPLE) + shape.hidden)


def resident(shape: ModelShape, item: float, place: Place, shared: bool = False) -> float:
    """Bytes of a model that does not learn, on each device. `shared`: whether FSDP splits it too."""
    return shape.parameters * item / (place.shards if shared else 1)


def chunk_logits(vocabulary: int, rows: int, learns: bool, mixed: bool) -> float:
    """Bytes of the logits of a chunk of `rows` targets, and what is computed next to them."""
    if not vocabulary:
        return 0.0
    if mixed:  # bf16 product, fp32 logits, log-probs, their gradient
        return min(rows, max(1, CHUNK // vocabulary)) * vocabulary * (14.0 if learns else 10.0)
    size = min(rows, max(ROWS, CHUNK // vocabulary))
    return 4.0 * vocabulary * (size + min(size, max(1, TILE // vocabulary)))


def training(
    one: Trained, base: Sum, batch: Rows, logits: float, accumulates: bool, place: Place, name: str = "train"
) -> Phase:
    """Return the larger moment of a training step on batches of this size.

    base         what is in memory all the time, apart from `one`
    accumulates  whether gradients of earlier parts or micro-batches are there already
    """
    network, gradients = one.network, 4 * one.elements
    head = one.embedding if one.tied else 0.0
    always = [*base, *one.state(), *_copies(one, place)]
    states = ("logits", logits + 4.0 * batch.count * network.shape.hidden * (logits > 0))
    forward = phase(
        name,
        [
            *always,
            ("gradients", (gradients if accumulates else 0.0) + head),
            ("activations", network.saved_bytes(batch)),
            states,
        ],
    )
    last = replace(network, checkpointing=False).block_bytes(batch, True)
    twice = one.embedding * ((1 if one.tied else 0) + (1 if accumulates else 0))
    backward = phase(
        name,
        [
            *always,
            ("gradients", gradients + twice),
            ("activations", last + network.working_bytes(batch)),
        ],
    )
    return max(forward, backward, key=lambda moment: moment.bytes)


def _copies(one: Trained, place: Place) -> Sum:
    """Under autocast the bf16 copies of trained weights; under data parallelism the buckets of their gradients."""
    found: Sum = []
    if one.network.mixed:
        found.append(("bf16 copies of weights", 2 * one.elements))
    if place.full_shard and place.devices > 1:
        shape = one.network.shape
        largest = max((shape.parameters - shape.embedding) / max(1, shape.layers), float(shape.embedding))
        found.append(("gathered layer", 4 * largest * 2))
    elif place.devices > 1:
        found.append(("gradient buckets", 4 * one.elements))
    return found


def common(place: Place) -> Sum:
    """What every process has: the libraries."""
    return [("library baseline", place.library_baseline)]


def of_sft(config: SftConfig, sizes: Sizes, place: Place, lengths: Lengths) -> MemoryPlan:
    """Return the memory of `gemma2 sft`."""
    shape = sizes(config.model)
    one = trained(config, shape, place, config.trainer)
    if place.kind == "accelerator" and config.attention != "eager":
        one = replace(one, network=replace(one.network, attention="flash"))
    width = min(config.max_length, lengths.row or config.max_length)
    micro = Rows(config.micro_batch_size or config.batch_size, config.max_length if config.packing else width)
    tokens = config.micro_batch_tokens or (PART_TOKENS if one.network.attention == "blockwise" else None)
    batch = cpu_parts(micro, tokens) if tokens else micro
    logits = chunk_logits(shape.vocabulary, batch.count, True, one.network.mixed)
    accumulates = batch.rows < config.batch_size
    return MemoryPlan((training(one, common(place), batch, logits, accumulates, place),))


def of_reward(config: RewardConfig, sizes: Sizes, place: Place, lengths: Lengths) -> MemoryPlan:
    """Return the memory of `gemma2 reward`. A row is one side of a pair."""
    shape = replace(sizes(config.model), outputs=1)
    one = trained(config, shape, place, config.trainer)
    width = min(config.max_length, lengths.row or config.max_length)
    pairs = config.micro_batch_size or config.batch_size
    batch = Rows(2 * pairs, width)
    if one.network.attention == "blockwise":
        batch = Rows(2 * cpu_parts(Rows(pairs, 2 * width), PART_TOKENS).rows, width)
    accumulates = batch.rows < 2 * config.batch_size
    return MemoryPlan((training(one, common(place), batch, 0.0, accumulates, place),))


def of_distill(config: DistillConfig, sizes: Sizes, place: Place, lengths: Lengths) -> MemoryPlan:
    """Return the memory of `gemma2 distill`: the student answers, then both models read the answers."""
    shape = sizes(config.model)
    one = trained(config, shape, place, config.trainer)
    one = replace(one, network=replace(one.network, attention="eager"))
    base = common(place)
    if config.teacher is not None:
        item = dtype_bytes(config.teacher_dtype, place)
        base.append(("teacher", resident(sizes(config.teacher), item, place)))
    answers = config.prompts is not None
    prompt, width = lengths.prompt or PROMPT, min(config.max_length, lengths.row or config.max_length)
    if answers:
        width = max(prompt + config.max_new_tokens, width if config.data is not None else 0)
    micro = config.micro_batch_size or config.batch_size
    batch = Rows(micro, width)
    chunk = min(batch.count, max(1, CHUNK // max(1, shape.vocabulary))) * shape.vocabulary * 4.0
    logits = chunk * DIVERGENCE_COPIES[config.divergence]
    phases = [training(one, base, batch, logits, micro < config.batch_size, place)]
    if config.teacher is not None:
        reading = Network(sizes(config.teacher), "eager", mixed=place.kind == "accelerator")
        phases[0] = max(phases[0], reads(one, base, batch, reading, place), key=lambda moment: moment.bytes)
    if answers:
        rows = config.batch_size
        phases.insert(0, generating(one, base, rows, Lengths(None, prompt), config.max_new_tokens, True))
    return MemoryPlan(tuple(phases))


def reads(one: Trained, base: Sum, batch: Rows, reading: Network, place: Place) -> Phase:
    """Return the moment at which the teacher reads a batch, when the student has kept its activations."""
    kept = one.network.saved_bytes(batch) + reading.forward_bytes(batch)
    return phase("train", [*base, *one.state(), *_copies(one, place), ("activations", kept)])


def generating(
    one: Trained, base: Sum, rows: int, lengths: Lengths, new: int, whole: bool, name: str = "generate"
) -> Phase:
    """Return the phase in which a model in training answers prompts: its cache, logits, and copies of its weights."""
    shape, mixed = one.network.shape, one.network.mixed
    prompt = lengths.prompt or PROMPT
    item = 2 if mixed else 4
    prefill = replace(one.network, attention="eager", checkpointing=False).forward_bytes(Rows(rows, prompt))
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    joined = float(shape.layers * shape.hidden * (queries + 2 * keys))
    copies = joined if one.network.trained else float(shape.parameters - shape.embedding) + joined
    return phase(
        name,
        [
            *base,
            *one.state(),
            ("copies of weights for decoding", 4.0 * copies),
            ("KV cache", decode_bytes(one.network, rows, prompt, new, item)),
            ("logits", sampler_logits(shape, rows, whole)),
            ("activations", prefill),
        ],
    )


def dtype_bytes(name: str, place: Place) -> float:
    """Return the bytes of an element of a model of this dtype. auto: bf16 on an accelerator, fp32 on a CPU."""
    half = name in ("bfloat16", "float16") or (name == "auto" and place.kind == "accelerator")
    return 2.0 if half else 4.0
