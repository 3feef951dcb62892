"""Everything that a merge will read, compute and write. Unusable inputs are refused here, before a tensor is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.safetensors_header import ITEM_BYTES
from gemma2.core.outputs.staging import check_output, check_space
from gemma2.core.progress import SILENT
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.inputs.compatibility import (
    check_model,
    check_same_architecture,
    check_same_tensors,
    check_same_tokenizer,
)
from gemma2.merging.inputs.families import carried_tensors, tower_note
from gemma2.merging.inputs.output_heads import copies_of, same_heads
from gemma2.merging.inputs.resolve import open_input
from gemma2.merging.methods.method import Group, Method
from gemma2.merging.methods.parameters import Schedule
from gemma2.merging.methods.request import DTYPES, MergeRequest
from gemma2.merging.methods.request_check import check_request
from gemma2.merging.methods.table import METHODS
from gemma2.merging.remote.arrivals import ON_DISK, Arrivals
from gemma2.merging.remote.open_arrivals import arrivals_of
from gemma2.merging.tokenizers.chat_template import ChatTemplate, choose_template
from gemma2.merging.tokenizers.differing_files import differing_files
from gemma2.merging.tokenizers.generation_config import Asking, choose_asking
from gemma2.merging.tokenizers.row_map import vocabulary_tensors
from gemma2.merging.tokenizers.vocabulary import Vocabulary, choose_vocabulary

from .groups import Part, check_shapes, find_groups, group_of, one_to_one, read_through, stacked
from .places import common_parent, seeks_base

__all__ = ["NO_BASE", "NO_BASE_FIX", "MergePlan", "group_of", "output_paths", "plan_merge"]

NO_BASE = "no --base, and the models record no common parent: SLERP of the weights themselves"
NO_BASE_FIX = "for policies of one init that is LERP in effect, name the init with --base"


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A merge that was checked and can be carried out.

    parts       sources of each tensor of the output, by its name
    layout      of the output: dtype and shape by name, in the order of the file
    config      keys of config.json that differ from those of the first model
    vocabulary  of the output, if a tokenizer is chosen
    carried     tensors that the output takes from the first model, unchanged
    template    of the output's chats, if one is chosen
    arrivals    says which bytes of the inputs have arrived
    asking      generation config and special tokens, as far as they are chosen
    """

    request: MergeRequest
    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    groups: tuple[Group, ...]
    parts: Mapping[str, Part]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    outputs: tuple[Path, ...]
    config: JsonMapping
    vocabulary: Vocabulary | None = None
    template: ChatTemplate | None = None
    asking: Asking = field(default_factory=Asking)
    notes: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    arrivals: Arrivals = ON_DISK
    warnings: tuple[str, ...] = ()

    @property
    def method(self) -> Method:
        """The entry of METHODS."""
        return METHODS[self.request.method]

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """The base, if there is one, and the models."""
        return (*((self.base,) if self.base else ()), *self.models)

    @property
    def parameters(self) -> int:
        """The number of elements of one output."""
        return sum(prod(shape) for _, shape in self.layout.values())

    @property
    def output_bytes(self) -> int:
        """The size of the weights of one output."""
        return sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.layout.values())

    @property
    def input_bytes(self) -> int:
        """The size of the weights of all operands that take part."""
        return sum(source.nbytes for part in self.parts.values() for source in part.sources)

    def describe(self) -> JsonObject:
        """Return the plan for a dry run."""
        place = _existing(self.outputs[0])
        return {
            **self.request.options(),
            "vectors": f"task vectors from {self.base.path}" if self.base else "the weights themselves",
            "models": [str(model.path) for model in self.models],
            "outputs": [str(path) for path in self.outputs],
            "parameters": self.parameters,
            "tensors": len(self.layout),
            "groups": [group.name for group in self.groups],
            "passes": self.method.passes,
            "bytes_to_read": self.input_bytes * self.method.passes,
            "bytes_to_write": self.output_bytes * len(self.outputs),
            "bytes_free": shutil.disk_usage(place).free,
            "notes": list(self.notes),
            "warnings": [*self.warnings, *self._without_base()],
        }

    def _without_base(self) -> list[str]:
        """The warning of SLERP on weights. A merge itself warns with the angle (`group_report.judge`)."""
        spherical = self.request.method in ("slerp", "warp")
        return [f"{NO_BASE}; {NO_BASE_FIX}"] if spherical and self.base is None else []


def plan_merge(request: MergeRequest, out: Path, force: bool = False, *, arrivals: Arrivals | None = None) -> MergePlan:
    """Check a merge completely. Raises UsageError, InputError or OutputError; changes nothing but the hub's cache.

    The plan's request has its base and its defaults filled in. `arrivals` fetches hub models that are to be merged
    while they arrive; without it the plan cannot be carried out if the request says so.
    """
    request = check_request(request)
    if arrivals is None:
        with arrivals_of(request.stream, SILENT.note) as found:
            return _plan(request, out, force, found)
    return _plan(request, out, force, arrivals)


def _plan(request: MergeRequest, out: Path, force: bool, arrivals: Arrivals) -> MergePlan:
    models = tuple(open_input(path, f"model {i + 1}", request.base, arrivals) for i, path in enumerate(request.models))
    request, notes = _find_base(request, models)
    base = open_input(request.base, "base", None, arrivals) if request.base else None
    for model in (*models, *((base,) if base else ())):
        check_model(model)
    inputs, config, said = same_heads((*((base,) if base else ()), *models), models[0], request.allow_config)
    base, models = inputs[0] if base else None, tuple(inputs[-len(models) :])
    notes += [*said, *_check_same(request, models, base)]
    vocabulary = choose_vocabulary(request, base, models) if request.tokenizer else None
    if request.slices:
        parts, changes = stacked(request, base, models)
        config |= changes
    else:
        parts = one_to_one(request, base, models)
    if vocabulary:
        parts, config = read_through(parts, vocabulary), {**config, **vocabulary.config}
        notes = [*notes, *vocabulary.notes]
        if request.tokenizer not in ("base", "union"):
            request = replace(request, tokenizer=vocabulary.owner.role)  # recorded like all inputs: without its path
    operands = (*((base,) if base else ()), *models)
    template = choose_template(request.chat_template, operands, vocabulary.owner if vocabulary else models[0])
    asking = choose_asking(request, operands, models[0], vocabulary)
    config |= asking.config
    notes = [*notes, *(template.notes if template else ()), *asking.notes]
    for part in parts.values():
        check_shapes(part)
    layout = _layout(request, parts, base is not None)
    carried = _carried(request, models[0])
    for name in carried:
        del parts[name]
    plan = MergePlan(
        request=request,
        base=base,
        models=models,
        groups=find_groups(request.granularity, base is not None, parts),
        parts=parts,
        layout=layout,
        outputs=output_paths(request, out),
        config=config,
        vocabulary=vocabulary,
        template=template,
        asking=asking,
        carried=carried,
        arrivals=arrivals,
        warnings=(
            *dict.fromkeys(line for model in inputs for line in model.doubts),
            *differing_files(request, models, vocabulary),
        ),
        notes=(
            *notes,
            *tower_note(models[0]),
            *(f"{line}: merged and written once" for line in copies_of(inputs)),
        ),
    )
    _check_outputs(plan, force)
    return plan


def _carried(request: MergeRequest, first: Checkpoint) -> tuple[str, ...]:
    """Return the tensors of the towers besides the text model. Raises UsageError if the request cannot leave them."""
    carried = carried_tensors(first)
    for flag, given in (("--slices", request.slices), ("--tokenizer", request.tokenizer)):
        if carried and given:
            raise UsageError(f"{flag}: {first} has a vision tower", "merge text models, without a tower")
    return carried


def _check_same(request: MergeRequest, models: Sequence[Checkpoint], base: Checkpoint | None) -> list[str]:
    """Require that all inputs compute the same function of their weights and, unless one is chosen, one tokenizer.

    Returns notes on the keys of config.json that may differ.
    """
    notes = []
    first = models[0]
    free = [*(["num_hidden_layers"] if request.slices else []), *(["vocab_size"] if request.tokenizer else [])]
    for other in (*models[1:], *((base,) if base else ())):
        for one in check_same_architecture(first, other, free, request.allow_config):
            values = one.values(first.role, other.role)
            notes.append(f"{one.key} differs: {values}; allowed, the output has that of {first.role}")
        if not request.slices:
            resized = vocabulary_tensors(first) & vocabulary_tensors(other) if request.tokenizer else ()
            check_same_tensors(first, other, resized)
        if not request.tokenizer:
            check_same_tokenizer(first, other)
    return notes


def _layout(request: MergeRequest, parts: Mapping[str, Part], based: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the output's tensors: those of the first model, unless a dtype is requested."""
    dtype = DTYPES[request.dtype] if request.dtype else None
    sources = {name: part.sources[1 if based else 0] for name, part in parts.items()}
    return {name: (dtype or source.tensor.dtype, source.shape) for name, source in sources.items()}


def output_paths(request: MergeRequest, out: Path) -> tuple[Path, ...]:
    """Return the paths of the outputs: `out`, or with several etas one directory per eta in it."""
    if len(request.etas) < 2:
        return (out,)
    if any(isinstance(eta, Schedule) for eta in request.etas):
        raise UsageError("a gradient of eta is possible for one output only", "give one eta")
    etas = [float(eta) for eta in request.etas]
    return tuple(out / f"eta-{f'{eta:.2f}' if round(eta, 2) == eta else repr(eta)}" for eta in etas)


def _existing(path: Path) -> Path:
    """Return the nearest folder above a path that exists."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _check_outputs(plan: MergePlan, force: bool) -> None:
    """Check the paths of the outputs, their overlap with inputs, and the free space of the disk. Raises OutputError."""
    inputs = {model.role: model.path for model in plan.inputs}
    inputs |= {f"model of {model.role}": model.origin for model in plan.inputs if model.origin != model.path}
    for out in plan.outputs:
        check_output(out, force, inputs)
    check_space(plan.outputs[0], plan.output_bytes * len(plan.outputs))


def _find_base(request: MergeRequest, models: Sequence[Checkpoint]) -> tuple[MergeRequest, list[str]]:
    """Return the request and notes; without a given base, methods that use one take the recorded common parent.

    Raises UsageError or InputError if the method needs a base and none is found.
    """
    if request.base is not None or not seeks_base(request):
        return request, []
    recorded, base = common_parent([model.path for model in models])
    if base is not None:
        return replace(request, base=base), [f"base: {base}, the parent that all models record"]
    # Part of the notes, which the manifest records: its wording is part of the output.
    lost = f"the models record {recorded} as their common parent, but it is missing or has other weights"
    if METHODS[request.method].base == "optional":
        return request, [f"{lost}: merging the weights themselves"] if recorded else []
    if recorded:
        raise InputError(lost, "name it: --base")
    raise UsageError(
        f"merge {request.method} needs the init of the models, and they record no common parent", "name it: --base"
    )
