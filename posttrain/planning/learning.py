"""Memory of the commands that learn from rows: sft, distill and reward. Torch-free.

A training step has two moments that may be the largest: the end of the forward pass, when every block has kept its
activations, and the end of the backward pass, when every gradient is there. Between them the ones go as the others
come. An embedding that is also the output head gets two gradients, each as large as the table (V x d).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gemma2.posttrain.schemas import DistillConfig, LoraFields, RewardConfig, SftConfig

from .activations import Attention, NetworkInUse, RowBatch, cpu_parts, decode_bytes, sampler_logits
from .parts import Bytes, Lengths, MemoryPlace, Moment, Sum, blocks
from .shapes import ModelShape

__all__ = [
    "CHUNK",
    "PART_TOKENS",
    "PROMPT",
    "Sizes",
    "Trained",
    "chunk_logits",
    "decoding_copies",
    "dtype_bytes",
    "gathered",
    "generating",
    "kernel_on",
    "of_distill",
    "of_reward",
    "of_sft",
    "resident",
    "trained",
    "training",
]

Sizes = Callable[[Path], ModelShape]

PART_TOKENS = 2048  # per forward pass on a CPU (sft_trainer.py, reward_trainer.py, scorer.py)
CHUNK, ROWS, TILE = 2**24, 128, 2**22  # logits at once (cross_entropy.py, scorer.py, divergence.py)
SAMPLE = 2**16  # elements per tensor that are kept in fp64, to see how far the weights move (movement.py)
DIVERGENCE_COPIES = {"forward-kl": 5, "reverse-kl": 5, "jsd": 8}  # of a chunk of logits
PROMPT = 512  # tokens of the longest prompt where nothing is known of the data


@dataclass(frozen=True)
class Trained:
    """The weights that a command trains, per device.

    weights    bytes of all of the model: fp32 where it is trained, bf16 below adapters on an accelerator
    elements   trained elements
    gradients  memory of one gradient of every trained tensor
    embedding  memory of the gradient of the embedding; none if it is frozen
    tied       whether the output head shares the embedding
    records    bytes that are kept of the start, to see how far the weights moved
    item       bytes of an element of the weights as they are loaded
    formed     bytes of the matrix of a quantised base that a product is formed with; 0: the base is not quantised
    unpacked   bytes of the base before it was quantised, where it is loaded to the same memory
    """

    network: NetworkInUse
    weights: float
    elements: float
    gradients: Bytes
    embedding: Bytes
    tied: bool
    records: float
    item: float = 4.0
    formed: float = 0.0
    unpacked: float = 0.0

    def state(self) -> Sum:
        """Weights, the optimizer's moments (Adam, fp32), and the records of the start."""
        return [
            ("weights", Bytes(self.weights)),
            ("optimizer", Bytes(8 * self.elements)),
            ("records of the start", Bytes(self.records)),
            ("dequantised matrix", Bytes(self.formed)),
        ]


def kernel_on(place: MemoryPlace, asked: str) -> Attention:
    """Return how a model attends that reads whole rows: on a CPU in blocks, on an accelerator as `--attention` says.

    auto counts as flex_attention, which it takes unless the check before the start finds it wrong.
    """
    if place.kind == "cpu":
        return "blockwise"
    return "eager" if asked == "eager" else "flash"


def trained(
    config: LoraFields, shape: ModelShape, place: MemoryPlace, mapping: Mapping[str, object], asked: str
) -> Trained:
    """Return what training a model of this shape takes. `mapping`: the options under `trainer:`; asked: --attention."""
    rank, share = config.lora_rank, 1 / place.shards
    adapters = shape.adapter_parameters(rank, config.lora_targets) if rank else 0.0
    accelerated = place.kind == "accelerator"
    checkpointing = bool(mapping.get("activation_checkpointing", accelerated))
    attention = kernel_on(place, asked)
    if attention == "blockwise" and checkpointing:
        attention = "eager"
    network = NetworkInUse(
        shape,
        attention,
        mixed=accelerated and bool(mapping.get("bf16", True)),
        checkpointing=checkpointing,
        trained=rank == 0,
        rank=rank,
        adapted=len(shape.adapted(config.lora_targets)) if rank else 0,
    )
    embedding = blocks(4.0 * shape.embedding)
    item = dtype_bytes(str(getattr(config, "dtype", "auto")), place) if rank and accelerated else 4.0
    base = shape.parameters * item if config.base_bits is None else shape.quantised_bytes(config.base_bits, item)
    return Trained(
        network,
        weights=(base + 4 * adapters) * share,
        elements=(adapters if rank else shape.parameters) * share,
        gradients=(Bytes(0.0, 4 * adapters, 4 * adapters) if rank else _gradients(shape)) * share,
        # Divided weights are gathered with their gradients (`gathered`): the two of the embedding among them.
        embedding=Bytes() if rank or place.full_shard else embedding,
        tied=shape.tied and not shape.outputs,
        records=0.0 if rank else 8 * _sampled(shape),
        item=item,
        formed=item * shape.largest_matrix() if config.base_bits else 0.0,
        unpacked=item * shape.parameters if config.base_bits and not accelerated else 0.0,
    )


def _gradients(shape: ModelShape) -> Bytes:
    """Memory of the gradients of all tensors of a model."""
    sizes = [4.0 * inputs * outputs for inputs, outputs in shape.linear_layers().values()]
    found = sum((blocks(size, shape.layers) for size in sizes), blocks(4.0 * shape.embedding, 1 if shape.tied else 2))
    return found + Bytes(0.0, max(0.0, 4 * shape.parameters - found.total))


def _sampled(shape: ModelShape) -> float:
    """Elements of all tensors, of each at most SAMPLE."""
    of_block = sum(min(inputs * outputs, SAMPLE) for inputs, outputs in shape.linear_layers().values())
    norms = 4 * min(shape.hidden, SAMPLE)
    return float(shape.layers * (of_block + norms) + min(shape.embedding, SAMPLE) + shape.hidden)


def resident(shape: ModelShape, item: float, share: float = 1.0) -> Bytes:
    """Memory of a model that does not learn: whole on each device, or a share of it."""
    return Bytes(shape.parameters * item * share)


def gathered(shape: ModelShape, item: float, place: MemoryPlace, at: Literal["forward", "layer", "end"]) -> Sum:
    """What a pass through divided weights has whole, in `item` bytes: the root, and of the layers this and the next.

    The root is embedding and head: its weights stay whole until the backward pass ends, and so does the gradient of the
    head. The gradient of a unit becomes a sum in fp32 before it is divided.

    at  forward: no gradients; layer: in the backward pass of a layer that is trained; end: in that of the root
    """
    if not place.full_shard:
        return []
    root, layer = shape.embedding, (shape.parameters - shape.embedding) / max(1, shape.layers)
    head = 0 if shape.outputs else root
    counts = {
        "forward": item * (root + 2 * layer),
        "layer": item * (root + head + 3 * layer) + 4 * layer,
        "end": (item + 4) * root,
    }
    return [("gathered weights", Bytes(counts[at]))]


def chunk_logits(vocabulary: int, rows: float, learns: bool, mixed: bool) -> Bytes:
    """Memory of the logits of a chunk of `rows` targets, and what is computed next to them."""
    if not vocabulary:
        return Bytes()
    if mixed:  # bf16 product, fp32 logits, log-probs, and their gradient
        return Bytes(min(rows, max(1, CHUNK // vocabulary)) * vocabulary * (14.0 if learns else 10.0))
    size = min(rows, max(ROWS, CHUNK // vocabulary))
    return blocks(4.0 * vocabulary * size) + blocks(4.0 * vocabulary * min(size, max(1, TILE // vocabulary)))


def training(
    one: Trained, base: Sum, batch: RowBatch, logits: Bytes, accumulates: bool, place: MemoryPlace, name: str = "train"
) -> list[Moment]:
    """Return the start of a training, and the moments of a step on batches of this size.

    base         what is in memory all the time, apart from `one`
    accumulates  whether gradients of earlier parts or micro-batches are there already
    """
    network = one.network
    shape, item = network.shape, 2 if network.mixed else 4
    head = one.embedding if one.tied else Bytes()
    always = [*base, *one.state(), *_copies(one, place)]
    states = blocks(4.0 * batch.count * shape.hidden, 2 if logits.total else 0)
    forward: Sum = [
        *always,
        *gathered(shape, item, place, "forward"),
        ("gradients", head + (one.gradients if accumulates else Bytes())),
        ("activations", network.saved_bytes(batch) + network.working_bytes(batch) + states),
        ("logits", logits),
    ]
    last = replace(network, checkpointing=False).block_bytes(batch, True)
    backward: Sum = [
        *always,
        *gathered(shape, item, place, "layer" if network.trained else "forward"),
        ("gradients", one.gradients + one.embedding * (one.tied + accumulates)),
        ("activations", last + network.working_bytes(batch)),
    ]
    moments = [Moment(name, forward), Moment(name, backward)]
    if place.full_shard and network.trained:
        moments.append(Moment(name, [*always, *gathered(shape, item, place, "end"), ("gradients", one.gradients)]))
    # Before the first step decoding is compared with the forward pass (forward_check.py); new adapters add nothing yet.
    copies = Bytes() if shape.outputs or one.formed else decoding_copies(shape, one.item)
    start: Sum = [
        *base,
        ("weights", Bytes(one.weights)),
        ("weights before they are quantised", Bytes(one.unpacked)),
        ("records of the start", Bytes(one.records)),
        ("copies of weights for decoding", copies),
    ]
    return [Moment("start", start), *moments]


def _copies(one: Trained, place: MemoryPlace) -> Sum:
    """Under autocast the bf16 copies of trained weights; under ddp the buckets of their gradients. fsdp has neither."""
    found: Sum = []
    if place.full_shard:
        return found
    if one.network.mixed:
        found.append(("bf16 copies of weights", Bytes(2 * one.elements)))
    if place.devices > 1:
        found.append(("gradient buckets", Bytes(4 * one.elements)))
    return found


def of_sft(config: SftConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 sft`."""
    shape = sizes(config.model)
    one = trained(config, shape, place, config.trainer, config.attention)
    width = min(config.max_length, lengths.row or config.max_length)
    rows = rows_of_each(config.batch_size, place)
    micro = RowBatch(config.micro_batch_size or rows, config.max_length if config.packing else width)
    tokens = config.micro_batch_tokens or (PART_TOKENS if one.network.attention == "blockwise" else None)
    batch = cpu_parts(micro, tokens) if tokens else micro
    logits = chunk_logits(shape.vocabulary, batch.count, True, one.network.mixed)
    return training(one, [], batch, logits, batch.rows < rows, place)


def of_reward(config: RewardConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 reward`. A row is one side of a pair."""
    shape = replace(sizes(config.model), outputs=1)
    one = trained(config, shape, place, config.trainer, config.attention)
    width = min(config.max_length, lengths.row or config.max_length)
    rows = rows_of_each(config.batch_size, place)
    pairs = config.micro_batch_size or rows
    batch = RowBatch(2 * pairs, width)
    if one.network.attention == "blockwise":
        one = replace(one, network=replace(one.network, last_only=shape.model_type == "gemma2"))
        batch = RowBatch(2 * cpu_parts(RowBatch(pairs, 2 * width), PART_TOKENS).rows, width)
    return training(one, [], batch, Bytes(), batch.rows < 2 * rows, place)


def of_distill(config: DistillConfig, sizes: Sizes, place: MemoryPlace, lengths: Lengths) -> list[Moment]:
    """Return the moments of `gemma2 distill`: the student answers, then both models read the answers."""
    shape = sizes(config.model)
    one = trained(config, shape, place, config.trainer, config.attention)
    kernel: Attention = "eager" if place.kind == "cpu" else one.network.attention
    one = replace(one, network=replace(one.network, attention=kernel))
    base: Sum = []
    item = dtype_bytes(config.teacher_dtype, place)
    if config.teacher is not None:
        base.append(("teacher", resident(sizes(config.teacher), item, 1 / place.shards)))
    prompt, width = lengths.prompt or PROMPT, min(config.max_length, lengths.row or config.max_length)
    if config.prompts is not None:
        width = max(prompt + config.max_new_tokens, width if config.data is not None else 0)
    rows = rows_of_each(config.batch_size, place)
    micro = config.micro_batch_size or rows
    batch = RowBatch(micro, width)
    chunk = min(batch.count, max(1, CHUNK // max(1, shape.vocabulary))) * shape.vocabulary * 4.0
    logits = blocks(chunk, DIVERGENCE_COPIES[config.divergence])
    moments = training(one, base, batch, logits, micro < rows, place)
    if config.teacher is not None:
        reading = NetworkInUse(sizes(config.teacher), kernel, mixed=place.kind == "accelerator")
        kept = one.network.saved_bytes(batch) + reading.forward_bytes(batch)
        copies = [*_copies(one, place), *gathered(sizes(config.teacher), item, place, "forward")]
        moments.append(Moment("train", [*base, *one.state(), *copies, ("activations", kept)]))
        if place.full_shard:  # the heads of both are whole while the divergence is computed
            states = [("activations", one.network.saved_bytes(batch)), ("logits", logits)]
            heads = gathered(shape, 2 if one.network.mixed else 4, place, "forward")
            moments.append(Moment("train", [*base, *one.state(), *copies, *heads, *states]))
    if config.prompts is not None:
        moments.insert(0, generating(one, base, rows, prompt, config.max_new_tokens, place))
    return moments


def rows_of_each(batch: int, place: MemoryPlace) -> int:
    """Return the rows of an optimizer step that each process has."""
    return max(1, batch // place.devices)


def generating(
    one: Trained, base: Sum, rows: int, prompt: int, new: int, place: MemoryPlace, lent: bool = False
) -> Moment:
    """Return the moment in which a model in training answers prompts: its cache, logits, and copies of its weights.

    Divided weights are gathered for the whole of it. lent: to a plain model, products of adapters added.
    """
    shape, item = one.network.shape, 2 if one.network.mixed else 4
    prefill = replace(one.network, attention="eager", checkpointing=False).forward_bytes(RowBatch(rows, prompt))
    # Under autocast every matrix is converted once; the products of adapters are added to copies.
    whole = place.full_shard
    every = (one.network.mixed and not whole) or not (one.network.trained or (lent and whole))
    copies = Bytes() if one.formed else decoding_copies(shape, item, every)
    if one.network.mixed and one.network.trained and not shape.outputs:  # the head as well
        copies += blocks(2.0 * shape.embedding)
    parts: Sum = [
        *base,
        *one.state(),
        *([("gathered weights", resident(shape, item))] if whole else []),
        ("copies of weights for decoding", copies),
        ("KV cache", decode_bytes(shape, rows, prompt, new, item)),
        ("logits", sampler_logits(shape, rows, True)),
        ("activations", prefill),
    ]
    return Moment("generate", parts)


def decoding_copies(shape: ModelShape, item: float, every: bool = False) -> Bytes:
    """Memory of the weights that decoding joins, those of queries, keys and values; of all of them if `every`."""
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    found = blocks(item * shape.hidden * (queries + 2 * keys), shape.layers)
    others = [size for name, size in shape.linear_layers().items() if name[0] not in "qkv"]
    for inputs, outputs in others if every else []:
        found += blocks(item * inputs * outputs, shape.layers)
    return found


def dtype_bytes(name: str, place: MemoryPlace) -> float:
    """Return the bytes of an element of a model of this dtype. auto: bf16 on an accelerator, fp32 on a CPU."""
    half = name in ("bfloat16", "float16") or (name == "auto" and place.kind == "accelerator")
    return 2.0 if half else 4.0
