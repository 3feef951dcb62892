"""An extraction that was checked: which tensors get factors, which are stored whole, which must not differ.

Factors are possible for the weight of a linear layer: a matrix that is not an embedding. Everything else that differs
(norms, embeddings, biases) is stored whole if its module is named, or left out if that is asked for; else the
extraction is refused, since the adapter would not be the model. The head of a classifier is always stored whole, as
peft itself does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Literal

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable
from gemma2.core.outputs.staging import check_output, check_space
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.inputs.compatibility import (
    check_model,
    check_same_architecture,
    check_same_tensors,
    check_same_tokenizer,
)
from gemma2.merging.inputs.families import is_decoder
from gemma2.merging.inputs.output_heads import tied_copies
from gemma2.merging.inputs.resolve import open_input
from gemma2.merging.methods.request import DTYPES
from gemma2.merging.plan.groups import BEFORE_LAYERS
from gemma2.merging.plan.places import common_parent

__all__ = ["EVERYTHING", "ExtractPlan", "ExtractRequest", "plan_extract"]

EVERYTHING = "all"  # value of --save-modules
EXPERTS = ".experts."  # transformers keeps the experts of a layer in one tensor, which peft cannot adapt by module
HEADS = {"SequenceClassification": ("SEQ_CLS", "score"), "TokenClassification": ("TOKEN_CLS", "score")}


@dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """The settings of `gemma2 merge extract-lora`; the paths may be hub ids, adapters or MODEL+ADAPTER.

    rank            of every module; with `explained` the largest one
    explained       share of the squared norm of each difference that its factors must hold
    target_modules  names of modules that get factors; () for every linear layer that differs
    save_modules    names of modules that are stored whole if they differ; `all` for everything without factors
    leave_out       what differs and is neither is left out, and reported
    """

    model: Path
    base: Path | None = None
    rank: int | None = None
    explained: float | None = None
    target_modules: tuple[str, ...] = ()
    save_modules: tuple[str, ...] = ()
    leave_out: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    threads: int = 2

    def options(self) -> JsonObject:
        """Return the settings that the manifest records: none that is a path, and none that decides nothing."""
        given = {
            "rank": self.rank,
            "explained": self.explained,
            "target_modules": list(self.target_modules),
            "save_modules": list(self.save_modules),
            "leave_out": self.leave_out or None,
            "dtype": self.dtype,
        }
        return {key: value for key, value in given.items() if value not in (None, [])}


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """targets: tensors that may get factors. saved: those of modules that are stored whole if they differ.

    rest   tensors that get neither
    task   peft's name of the kind of model
    """

    request: ExtractRequest
    base: Checkpoint
    model: Checkpoint
    out: Path
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    rest: tuple[str, ...]
    tied: dict[str, str]
    task: str
    notes: tuple[str, ...] = field(default=())

    def rank_of(self, name: str) -> int:
        """Return the largest possible rank of a tensor's factors."""
        side = min(self.model.tensors[name].shape)
        return min(self.request.rank or side, side)

    def bytes_of_factors(self, names: Iterable[str]) -> int:
        """Return the size of the factors of these tensors at the largest rank."""
        item = ITEM_BYTES[DTYPES[self.request.dtype]]
        return sum(self.rank_of(name) * sum(self.model.tensors[name].shape) * item for name in names)

    def describe(self) -> JsonObject:
        """Return the plan for a dry run."""
        sizes = [prod(self.model.tensors[name].shape) for name in self.targets]
        return {
            "plan": f"extract-lora {self.model.path} - {self.base.path} -> {self.out}, no tensor was read",
            **self.request.options(),
            "base": str(self.base.path),
            "linear layers": len(self.targets),
            "tensors stored whole if they differ": len(self.saved),
            "tensors that must not differ": 0 if self.request.leave_out else len(self.rest),
            "bytes_to_read": 2 * (self.base.nbytes + self.model.nbytes),
            "bytes_to_write_at_most": self.bytes_of_factors(self.targets)
            + sum(self.model.tensors[name].nbytes for name in self.saved),
            "largest_tensor_bytes": 4 * max(sizes, default=0),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def plan_extract(request: ExtractRequest, out: Path, force: bool = False) -> ExtractPlan:
    """Check an extraction from headers alone. Raises UsageError, InputError or OutputError; writes nothing."""
    _check_numbers(request)
    model = open_input(request.model, "model", request.base)
    base_path, notes = _base_of(request, model)
    base = open_input(base_path, "base")
    for one in (base, model):
        check_model(one)
    check_same_architecture(base, model)
    check_same_tensors(base, model)
    check_same_tokenizer(base, model)
    if not is_decoder(model):
        raise InputError(
            f"{model} is {_architecture(model)}: extract-lora is for decoders of text, whose layers peft knows by the "
            "names in their files",
            "merge the models themselves, by task-arithmetic",
        )
    task, head = next((found for end, found in HEADS.items() if _architecture(model).endswith(end)), ("CAUSAL_LM", ""))
    tied = tied_copies(base)
    names = [name for name in model.tensors if name not in tied]
    experts = next((name for name in names if EXPERTS in name), None)
    if experts is not None:
        raise InputError(
            f"{model} is a mixture of experts ({printable(experts)}): peft has no module for one expert",
            "merge the models themselves, by task-arithmetic",
        )
    linear = [name for name in names if _is_linear(model, name) and module_of(name) != head]
    named = [name for name in request.save_modules if name != EVERYTHING]
    _check_names("--save-modules", named, names)
    _check_names("--target-modules", request.target_modules, linear)
    whole = {name for name in names if is_meant(module_of(name), (*named, *([head] if head else [])))}
    wanted = request.target_modules
    targets = [n for n in linear if n not in whole and (not wanted or is_meant(module_of(n), wanted))]
    others = [name for name in names if name not in targets]
    saved = others if EVERYTHING in request.save_modules else [name for name in others if name in whole]
    plan = ExtractPlan(
        request=replace(request, base=base_path),
        base=base,
        model=model,
        out=out,
        targets=tuple(targets),
        saved=tuple(saved),
        rest=tuple(name for name in others if name not in set(saved)),
        tied=tied,
        task=task,
        notes=tuple(notes),
    )
    inputs = {f"{one.role}{extra}": path for one in (base, model) for extra, path in _places(one)}
    check_output(out, force, inputs)
    if request.rank is not None:
        check_space(out, plan.bytes_of_factors(plan.targets))
    return plan


def module_of(tensor: str) -> str:
    """Return the module that holds a tensor."""
    return tensor.rpartition(".")[0]


def is_meant(module: str, names: Sequence[str]) -> bool:
    """Whether one of the names means a module: its whole name, or the end of it behind a dot, as in peft."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _places(model: Checkpoint) -> list[tuple[str, Path]]:
    return [("", model.path), *([(" (its model)", model.origin)] if model.origin != model.path else [])]


def _architecture(model: Checkpoint) -> str:
    return str(model.config["architectures"][0])


def _is_linear(model: Checkpoint, name: str) -> bool:
    """Whether a tensor is the weight of a linear layer."""
    return name.endswith(".weight") and len(model.tensors[name].shape) == 2 and not BEFORE_LAYERS.search(name)


def _check_numbers(request: ExtractRequest) -> None:
    if request.rank is None and request.explained is None:
        raise UsageError(
            "extract-lora needs a rank", "give --rank 16, or --explained 0.95 for the rank that this needs"
        )
    if request.rank is not None and request.rank < 1:
        raise UsageError(f"--rank {request.rank} is not a rank", "give 1 or more")
    if request.explained is not None and not 0 < request.explained <= 1:
        raise UsageError(f"--explained {request.explained:g} is not a share", "give more than 0, and at most 1")


def _check_names(flag: str, given: Sequence[str], tensors: Sequence[str]) -> None:
    """Refuse a name that means no module of the model."""
    modules = {module_of(name) for name in tensors}
    for name in given:
        if not any(is_meant(module, [name]) for module in modules):
            known = {module.rpartition(".")[2] for module in modules}
            close = get_close_matches(name, known, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"give some of {', '.join(sorted(known)[:12])}"
            raise UsageError(f"{flag}: the model has no such module '{printable(name)}'", hint)


def _base_of(request: ExtractRequest, model: Checkpoint) -> tuple[Path, list[str]]:
    """Return the base: the given one, else the model that the manifest of the model records as its init."""
    if request.base is not None:
        return request.base, []
    recorded, found = common_parent([model.path])
    if found is None:
        lost = f"{model} records {recorded} as its init, but it is missing or has other weights"
        raise UsageError(lost if recorded else f"{model} records no init that it differs from", "name it: --base")
    return found, [f"base: {found}, the init that the model records"]
