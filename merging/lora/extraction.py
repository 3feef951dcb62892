"""The LoRA adapter of a model: for each linear layer, factors of its difference from the base, W - W_base ~ B A.

    pass 1    norms of all differences, streamed: what differs, and whether anything differs that the adapter would lack
    pass 2    tensor after tensor: difference (fp32), factors (`factorise`), rounding to --dtype, and the error
              |D - B A| of the factors as they are stored, summed in fp64

Memory holds one tensor: its difference in fp32, the eigenvectors of its smaller side in fp64 (exact method only), and
its factors. The scale of the adapter is 1 (lora_alpha = rank), and sqrt(S) goes to each factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from math import fsum
from pathlib import Path

import numpy as np

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.ancestry import write_card
from gemma2.core.outputs.manifest import Manifest, now, versions, write_manifest
from gemma2.core.outputs.model_identity import identity_of, parent_record
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable
from gemma2.core.outputs.staging import staged_output
from gemma2.core.progress import SILENT, Progress, Task
from gemma2.core.rounding import is_still, relative_change
from gemma2.merging.inputs.adapter import WEIGHTS, adapted_rows, load_factors, open_adapter
from gemma2.merging.inputs.checkpoint import Checkpoint, Reader
from gemma2.merging.inputs.tied_adapter import EMBEDDING_ENDS, head_name
from gemma2.merging.inspect.distances import Distances, Sums
from gemma2.merging.kernels.dtypes import narrow, widen
from gemma2.merging.kernels.native import announced
from gemma2.merging.kernels.number_formats import KINDS, Bytes, Floats
from gemma2.merging.methods.request import DTYPES
from gemma2.merging.plan.places import ADAPTED
from gemma2.merging.streaming.failures import no_empty_parents, system_refusals
from gemma2.merging.streaming.writer import Layout

from .adapter_files import AdapterWriter, adapter_config, factor_names, short_names, whole_name, write_config
from .extract_plan import ExtractPlan, ExtractRequest, module_of, plan_extract
from .extract_report import Extracted, report_of
from .factorise import factorise

__all__ = ["ExtractResult", "extract_lora"]

STEP = 1 << 20  # elements that are read at a time
ROWS = 1024  # rows of which the error is computed at a time
TRANSPOSED = ("gpt2",)  # model types whose linear layers store (in, out)


@dataclass(frozen=True)
class ExtractResult:
    """The adapter's directory, and the report that its manifest records."""

    plan: ExtractPlan
    summary: JsonObject


@dataclass(frozen=True)
class Changes:
    """What differs: tensors that get factors, modules that are stored whole, and tensors that are left out."""

    sums: dict[str, Sums]
    factored: tuple[str, ...]
    whole: tuple[str, ...]
    left_out: tuple[str, ...]


def extract_lora(
    request: ExtractRequest, *, out: Path, force: bool = False, progress: Progress = SILENT
) -> ExtractResult:
    """Write the difference of a model and its base as a LoRA adapter in peft's layout to `out`.

    Raises UsageError, InputError or OutputError, if possible before any work.
    """
    with system_refusals(out), ExitStack() as stack:
        plan = plan_extract(request, out, force)
        for line in plan.notes:
            progress.note(line)
        started = now()
        stack.enter_context(announced(progress.note))
        reader = stack.enter_context(Reader.open([plan.base, plan.model]))
        changes = _changes(plan, reader, progress)
        stack.enter_context(no_empty_parents(out))
        directory = stack.enter_context(staged_output(out, force))
        found, digest = _write(plan, changes, reader, directory, progress)
        write_config(directory, _config(plan, changes, found))
        open_adapter(directory, "output")
        summary = report_of(changes.sums, found, changes.whole, changes.left_out)
        manifest = _manifest(plan, summary, started)
        write_card(directory, manifest, out)
        write_manifest(directory, manifest, {WEIGHTS: digest})
    for line in summary["warnings"]:
        progress.warn(line)
    return ExtractResult(plan, summary)


# --- what differs -----------------------------------------------------------------------------------------------------


def _changes(plan: ExtractPlan, reader: Reader, progress: Progress) -> Changes:
    """Measure every difference. Raises InputError if nothing differs, or something that the adapter would lack."""
    _check_tied(plan, reader)
    names = [*plan.targets, *plan.saved, *plan.rest]
    total = sum(plan.base.tensors[name].nbytes + plan.model.tensors[name].nbytes for name in names)
    sums: dict[str, Sums] = {}
    with progress.task("compare", total=total, unit="bytes") as task:
        for name, one in Distances((plan.base, plan.model), reader, plan.request.threads).run(names):
            sums[name] = one
            task.advance(plan.base.tensors[name].nbytes + plan.model.tensors[name].nbytes)
    moved = {name for name, one in sums.items() if one.squares[2] > 0}
    if not moved:
        raise InputError(f"{plan.model} does not differ from {plan.base}", "give a model that was trained from it")
    if is_still(size := relative_change((one.squares[2], one.squares[0]) for one in sums.values())):
        progress.warn(f"{plan.model} differs from {plan.base} by {size:.1g} of the norm, which is rounding")
    lacking = tuple(name for name in plan.rest if name in moved)
    if lacking and not plan.request.leave_out:
        raise _lacking(plan, sums, lacking)
    stored = {module_of(name) for name in plan.saved if name in moved}
    return Changes(
        sums,
        tuple(name for name in plan.targets if name in moved),
        tuple(name for name in plan.saved if module_of(name) in stored),
        lacking,
    )


def _lacking(plan: ExtractPlan, sums: dict[str, Sums], names: Sequence[str]) -> InputError:
    """Error for differences that no factors hold: how many, which share of the whole, and what to do."""
    share = fsum(sums[name].squares[2] for name in names) / fsum(one.squares[2] for one in sums.values())
    kinds = sorted({module_of(name).rpartition(".")[2] for name in names})
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return InputError(
        f"{printable(names[0])}{others} differ from the base and get no factors: {share:.2g} of the squared difference",
        f"store them whole, --save-modules {','.join(kinds)}, or without them, --leave-out",
    )


def _check_tied(plan: ExtractPlan, reader: Reader) -> None:
    """Require that stored copies of tied tensors are equal to them, as a merge does."""
    for model in (plan.base, plan.model):
        for name, original in plan.tied.items():
            copy, kept = model.tensors[name], model.tensors[original]
            if (copy.dtype, copy.shape) != (kept.dtype, kept.shape) or not reader.same(copy, kept):
                raise InputError(
                    f"{model}: {name} differs from {original}, though config.json ties them",
                    'set "tie_word_embeddings" to false, or remove the wrong one',
                )


# --- writing ----------------------------------------------------------------------------------------------------------


class Values:
    """Reads ranges of a model's tensors as fp32, with the update of an adapter in it."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._factors = lru_cache(maxsize=2)(lambda update: load_factors(reader, update))

    def read(self, model: Checkpoint, name: str, first: int, count: int) -> Floats:
        """Return elements [first, first + count)."""
        tensor, update = model.tensors[name], model.updates.get(name)
        raw = np.empty(count * ITEM_BYTES[tensor.dtype], np.uint8)
        self.reader.read(tensor, first, count, raw)
        values = np.empty(count, np.float32)
        widen(raw, KINDS[tensor.dtype], values)
        if update is not None:
            adapted_rows(values, self._factors(update), first)
        return values

    def difference(self, plan: ExtractPlan, name: str) -> Floats:
        """Return W - W_base of one tensor."""
        shape = plan.model.tensors[name].shape
        found = np.empty(shape, np.float32)
        flat = found.reshape(-1)
        for first in range(0, flat.size, STEP):
            count = min(STEP, flat.size - first)
            ours, theirs = (self.read(model, name, first, count) for model in (plan.model, plan.base))
            np.subtract(ours, theirs, out=flat[first : first + count])
        return found

    def stored(self, model: Checkpoint, name: str) -> Iterator[Bytes]:
        """Yield a tensor in its own dtype, piece by piece."""
        tensor = model.tensors[name]
        for first in range(0, tensor.count, STEP):
            count = min(STEP, tensor.count - first)
            raw = np.empty(count * ITEM_BYTES[tensor.dtype], np.uint8)
            if name in model.updates:
                narrow(self.read(model, name, first, count), KINDS[tensor.dtype], raw)
            else:
                self.reader.read(tensor, first, count, raw)
            yield raw


def _write(
    plan: ExtractPlan, changes: Changes, reader: Reader, directory: Path, progress: Progress
) -> tuple[list[Extracted], str]:
    """Write the weights of the adapter, and read them back.

    Returns the report of each tensor that has factors, and the digest of the file.
    """
    values = Values(reader)
    total = sum(plan.model.tensors[name].count for name in changes.factored)
    found = []
    with (
        closing(AdapterWriter(directory, _largest(plan, changes))) as writer,
        progress.task("extract-lora", total=total, unit="parameters") as task,
    ):
        for name in changes.factored:
            found.append(_factored(plan, values, name, writer, task))
        for name in changes.whole:
            tensor = plan.model.tensors[name]
            writer.add(whole_name(name, _is_adapted(name, changes)), tensor.dtype, tensor.shape)
            for piece in values.stored(plan.model, name):
                writer.write(piece)
        for name in _tied_embedding(plan, changes):  # peft saves it twice, and reads both
            tensor = plan.model.tensors[name]
            writer.add(whole_name(head_name(plan.model), adapted=False), tensor.dtype, tensor.shape)
            for piece in values.stored(plan.model, name):
                writer.write(piece)
        writer.finish()
        return found, writer.read_back()


def _factored(plan: ExtractPlan, values: Values, name: str, writer: AdapterWriter, task: Task) -> Extracted:
    """Factorise and write one tensor."""
    delta = values.difference(plan, name)
    factors = factorise(delta, plan.request.rank, plan.request.explained)
    dtype = DTYPES[plan.request.dtype]
    (left, left_raw), (right, right_raw) = (_rounded(plan, name, side, dtype) for side in (factors.left, factors.right))
    residual = _residual(delta, left, right)
    module = module_of(name)
    a, b = (right, right_raw), (left, left_raw)
    if plan.model.config.get("model_type") in TRANSPOSED:
        a, b = ((side.T, _transposed(raw, side.shape)) for side, raw in (b, a))
    for label, (side, raw) in zip(factor_names(module), (a, b), strict=True):
        writer.add(label, dtype, side.shape)
        writer.write(raw)
    task.advance(delta.size)
    return Extracted(name, delta.shape, factors.rank, factors.svd, residual)


def _rounded(plan: ExtractPlan, name: str, side: object, dtype: str) -> tuple[Floats, Bytes]:
    """Return a factor as it is stored: its values as fp32, and its bytes."""
    values: Floats = np.ascontiguousarray(side, np.float32)
    raw = np.empty(values.size * ITEM_BYTES[dtype], np.uint8)
    if not narrow(values.reshape(-1), KINDS[dtype], raw):
        raise InputError(f"the factors of {printable(name)} overflow {dtype}", "give --dtype float32")
    kept = np.empty(values.size, np.float32)
    widen(raw, KINDS[dtype], kept)
    return kept.reshape(values.shape), raw


def _transposed(raw: Bytes, shape: tuple[int, ...]) -> Bytes:
    """Return the bytes of a matrix of this shape as those of its transpose."""
    return np.ascontiguousarray(raw.reshape(*shape, -1).swapaxes(0, 1)).reshape(-1)


def _residual(delta: Floats, left: Floats, right: Floats) -> float:
    """Return |delta - left @ right|^2, in fp64."""
    wide = right.astype(np.float64)
    parts = []
    for first in range(0, len(delta), ROWS):
        rows = slice(first, first + ROWS)
        parts.append(float(np.square(delta[rows] - left[rows].astype(np.float64) @ wide).sum()))
    return fsum(parts)


def _tied_embedding(plan: ExtractPlan, changes: Changes) -> list[str]:
    """Return the embedding if it is stored whole and is the head of the model too; else nothing."""
    if plan.task != "CAUSAL_LM" or (head_name(plan.model) in plan.model.tensors and not plan.tied):
        return []
    return [name for name in changes.whole if name.endswith(EMBEDDING_ENDS)]


def _is_adapted(name: str, changes: Changes) -> bool:
    """Whether the module of a tensor has factors."""
    return f"{module_of(name)}.weight" in changes.factored


def _largest(plan: ExtractPlan, changes: Changes) -> Layout:
    """Return a layout whose header is at least as long as that of the adapter."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in changes.factored:
        rows, columns = plan.model.tensors[name].shape
        rank = min(rows, columns)
        a, b = factor_names(module_of(name))
        layout |= {a: ("BF16", (rank, max(rows, columns))), b: ("BF16", (max(rows, columns), rank))}
    for name in changes.whole:
        layout[whole_name(name, _is_adapted(name, changes))] = ("F32", plan.model.tensors[name].shape)
    layout |= {whole_name(head_name(plan.model), adapted=False): ("F32", (2**30, 2**20))}
    layout |= {"": ("F64", (2**40,))}  # offsets of more digits than the adapter has
    return layout


# --- configuration and records ----------------------------------------------------------------------------------------


def _config(plan: ExtractPlan, changes: Changes, found: Sequence[Extracted]) -> JsonObject:
    """Return adapter_config.json."""
    modules = list(dict.fromkeys(module_of(name) for name in plan.model.tensors))
    ranks = {module_of(one.name): one.rank for one in found}
    whole = list(dict.fromkeys(m for m in map(module_of, changes.whole) if m not in ranks))
    biases = any(_is_adapted(name, changes) for name in changes.whole)
    flags = {
        **({"bias": "all"} if biases else {}),
        **({"fan_in_fan_out": True} if plan.model.config.get("model_type") in TRANSPOSED else {}),
        **({"ensure_weight_tying": True} if _tied_embedding(plan, changes) else {}),
    }
    names = (short_names(list(ranks), modules, dotted=True), short_names(whole, modules, dotted=False))
    return adapter_config(str(plan.request.base), plan.task, ranks, names, flags)


def _manifest(plan: ExtractPlan, summary: JsonObject, started: str) -> Manifest:
    """Return `gemma2.json`."""
    parents = []
    for role, model in (("base", plan.base), ("input", plan.model)):
        places = [(role, model.path), *([(ADAPTED, model.origin)] if model.origin != model.path else [])]
        parents += [parent_record(r, p, identity_of(p, plan.request.threads), plan.out) for r, p in places]
    return {
        "command": "merge extract-lora",
        "config": plan.request.options(),
        "parents": parents,
        "data": [],
        "versions": versions(),
        "started": started,
        "ended": now(),
        "status": "complete",
        "summary": summary,
    }
