"""The sources of each tensor of the output, and the groups of tensors that share coefficients.

Usually each tensor comes from its namesakes. With slices, the output stacks layers of the models in a new order (a
"frankenmerge"): tensors before the layers come from the first slice, those after them from the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, Tensor, printable
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.inputs.families import carried_tensors
from gemma2.merging.methods.method import Group
from gemma2.merging.methods.request import MergeRequest, Settings, Slice, settings_at
from gemma2.merging.tokenizers.row_map import ZEROS, RowMap, vocabulary_tensors

if TYPE_CHECKING:
    from gemma2.merging.inputs.low_rank import LowRank
    from gemma2.merging.tokenizers.vocabulary import Vocabulary

__all__ = ["Part", "Source", "check_shapes", "find_groups", "group_of", "one_to_one", "read_through", "stacked"]

LAYER = re.compile(r"^(?P<stem>(?:.*\.)?(?:layers|layer|h|blocks)\.)(?P<index>\d+)(?=\.)")
BEFORE_LAYERS = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|embeddings)\.")


@dataclass(frozen=True)
class Source:
    """One tensor of one input, under its name in that input.

    rows  the rows of this and other inputs that the output takes, in order; None means all of this tensor's rows
    """

    model: Checkpoint
    name: str
    rows: RowMap | None = None

    @property
    def tensor(self) -> Tensor:
        """The stored tensor."""
        return self.model.tensors[self.name]

    @property
    def update(self) -> LowRank | None:
        """The update that an adapter adds to it."""
        return self.model.updates.get(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with which it takes part in the merge."""
        shape = self.tensor.shape
        return (self.rows.count, *shape[1:]) if self.rows else shape

    @property
    def count(self) -> int:
        """The number of elements that take part."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes of the elements that take part."""
        return self.count * ITEM_BYTES[self.tensor.dtype]

    def pieces(self, first: int, count: int) -> Iterator[tuple[Source | None, int, int]]:
        """Yield elements [first, first + count) as (stored tensor, first element in it, number), in order.

        None is zeros instead of a tensor.
        """
        if self.rows is None:
            yield self, first, count
            return
        spans = self.rows.spans(first, count, prod(self.tensor.shape[1:]))
        for model, begin, number in zip(*(column.tolist() for column in spans), strict=True):
            yield None if model == ZEROS else Source(self.rows.inputs[model], self.name), begin, number


@dataclass(frozen=True)
class Part:
    """One tensor of the output: its sources in the order of the coefficients, and the request that applies to it.

    depth  of its layer in [0, 1]; 0 before the layers and 1 after them
    """

    sources: tuple[Source, ...]
    request: MergeRequest
    depth: float


def group_of(name: str) -> str:
    """Return the group of a tensor: its transformer layer; the embedding, final norm and head are separate groups.

    WARP applies SLERP "independently to the 28 layers" and does not mention the others.
    """
    layer = LAYER.match(name)
    path = layer.group() if layer else name.rsplit(".", 1)[0]
    return path.removeprefix("model.")


def layer_count(model: Checkpoint) -> int:
    """Return the number of transformer layers, by the names of the tensors."""
    merged = model.tensors.keys() - set(carried_tensors(model))
    indices = [int(match["index"]) for match in map(LAYER.match, merged) if match]
    return max(indices, default=-1) + 1


def _depth(name: str, layers: int) -> float:
    layer = LAYER.match(name)
    if layer:
        return int(layer["index"]) / max(layers - 1, 1)
    return 0.0 if BEFORE_LAYERS.search(name) else 1.0


def one_to_one(request: MergeRequest, base: Checkpoint | None, models: Sequence[Checkpoint]) -> dict[str, Part]:
    """Return every tensor of the first model with its namesakes."""
    operands = (*((base,) if base else ()), *models)
    layers = layer_count(models[0])
    return {
        name: Part(tuple(Source(model, name) for model in operands), request, _depth(name, layers))
        for name in models[0].tensors
    }


def find_groups(granularity: str | None, based: bool, parts: Mapping[str, Part]) -> tuple[Group, ...]:
    """Return the groups that share coefficients: tensors of a layer (or tensor, or model) with the same settings."""
    groups: dict[tuple[str, Settings, int], list[str]] = {}
    for name, part in parts.items():
        key = {"layer": group_of(name), "tensor": name, "model": "model"}[granularity or "layer"]
        settings = settings_at(part.request, name, part.depth)
        groups.setdefault((key, settings, len(part.sources) - based), []).append(name)
    keys = [key for key, _, _ in groups]
    seen: dict[str, int] = {}
    found = []
    for (key, settings, models), tensors in groups.items():
        seen[key] = seen.get(key, 0) + 1
        name = key if keys.count(key) == 1 else f"{key} ({seen[key]})"
        found.append(Group(name, tuple(tensors), settings, based, models))
    return tuple(found)


def stacked(
    request: MergeRequest, base: Checkpoint | None, models: Sequence[Checkpoint]
) -> tuple[dict[str, Part], JsonObject]:
    """Return the parts of a request with slices, and the keys of config.json that its layers change.

    Raises UsageError or InputError for ranges that do not exist or do not fit each other.
    """
    counts = [layer_count(model) for model in models]
    base_count = layer_count(base) if base else 0
    for number, part in enumerate(request.slices):
        _check_slice(request, part, number, counts, base_count)
    parts: dict[str, Part] = {}
    first, last = request.slices[0], request.slices[-1]
    outside = [name for name in models[0].tensors if not LAYER.match(name)]
    for name in (name for name in outside if BEFORE_LAYERS.search(name)):
        parts[name] = _outside_part(request, first, name, base, models)
    total = 0
    origins: list[tuple[Checkpoint, int]] = []
    for part in request.slices:
        for step in range(part.layers[0][2] - part.layers[0][1]):
            parts |= _layer_parts(request, part, step, total, base, models)
            origins.append((models[part.layers[0][0]], part.layers[0][1] + step))
            total += 1
    for name in (name for name in outside if not BEFORE_LAYERS.search(name)):
        parts[name] = _outside_part(request, last, name, base, models)
    return parts, {"num_hidden_layers": total, **_layer_types(origins)}


def _check_slice(request: MergeRequest, part: Slice, number: int, counts: Sequence[int], base_count: int) -> None:
    lengths = {end - first for _, first, end in part.layers}
    if not part.layers or len(lengths) != 1 or min(lengths) < 1:
        raise UsageError(
            f"slice {number + 1} has sources of {sorted(lengths)} layers", "give ranges of the same length"
        )
    ranges = [(str(request.models[model]), first, end, counts[model]) for model, first, end in part.layers]
    if request.base is not None and base_count:
        low, high = part.base or part.layers[0][1:]
        ranges.append((str(request.base), low, high, base_count))
    for path, low, high, count in ranges:
        if not 0 <= low < high <= count:
            raise UsageError(f"slice {number + 1}: {path} has {count} layers, not [{low}, {high})", "correct the range")


def _sub_request(request: MergeRequest, part: Slice) -> MergeRequest:
    chosen = tuple(request.models[model] for model, _, _ in part.layers)
    return replace(request, models=chosen, slices=(), **part.changes)


def _outside_part(
    request: MergeRequest, part: Slice, name: str, base: Checkpoint | None, models: Sequence[Checkpoint]
) -> Part:
    chosen = [models[model] for model, _, _ in part.layers]
    sources = tuple(Source(model, name) for model in (*((base,) if base else ()), *chosen))
    _check_present(sources)
    return Part(sources, _sub_request(request, part), 0.0 if BEFORE_LAYERS.search(name) else 1.0)


def _layer_parts(
    request: MergeRequest, part: Slice, step: int, index: int, base: Checkpoint | None, models: Sequence[Checkpoint]
) -> dict[str, Part]:
    """Return the tensors of one layer of the output. Gradients run over the layers of the slice."""
    sub = _sub_request(request, part)
    depth = step / max(part.layers[0][2] - part.layers[0][1] - 1, 1)
    operands = [(models[model], first + step) for model, first, _ in part.layers]
    if base:
        operands.insert(0, (base, (part.base or part.layers[0][1:])[0] + step))
    found = {}
    for name in operands[-1][0].tensors:
        layer = LAYER.match(name)
        if layer and int(layer["index"]) == operands[-1][1]:
            stem, rest = layer["stem"], name[layer.end() :]
            sources = tuple(Source(model, f"{stem}{number}{rest}") for model, number in operands)
            _check_present(sources)
            found[f"{stem}{index}{rest}"] = Part(sources, sub, depth)
    return found


def _check_present(sources: Sequence[Source]) -> None:
    """Require that all operands have the tensor. Raises InputError."""
    for source in sources:
        if source.name not in source.model.tensors:
            raise InputError(f"{source.model} has no {printable(source.name)}", "stack layers of one architecture")


def check_shapes(part: Part) -> None:
    """Require that all operands have one shape. Raises InputError naming them."""
    sources = part.sources
    if len({source.shape for source in sources}) > 1:
        shown = ", ".join(f"{list(source.shape)} in {source.model}" for source in sources)
        name = printable(sources[-1].name)
        raise InputError(f"{name} is {shown}", "merge models of one architecture and one vocabulary")


def _layer_types(origins: Sequence[tuple[Checkpoint, int]]) -> JsonObject:
    """Return `layer_types`: Gemma 2 alternates local and global attention, and each stacked layer keeps its kind."""
    if not any("layer_types" in model.config or model.config.get("model_type") == "gemma2" for model, _ in origins):
        return {}
    kinds = []
    for model, index in origins:
        listed = model.config.get("layer_types")
        alternating = "sliding_attention" if index % 2 == 0 else "full_attention"
        kinds.append(listed[index] if isinstance(listed, list) and index < len(listed) else alternating)
    return {"layer_types": kinds}


def read_through(parts: Mapping[str, Part], vocabulary: Vocabulary) -> dict[str, Part]:
    """Return the parts, with the tensors that have a row per id read through the row maps."""
    named = {model.role: vocabulary_tensors(model) for model in vocabulary.inputs}

    def mapped(source: Source) -> Source:
        role = source.model.role
        return replace(source, rows=vocabulary.maps[role]) if source.name in named[role] else source

    return {name: replace(part, sources=tuple(map(mapped, part.sources))) for name, part in parts.items()}
