"""Output heads and the embeddings that they are tied to: stored copies are dropped, and where models need it, untied.

tied, no head stored           the head is the embedding
tied, a copy stored            dropped; that it is equal is checked when tensors are read
an adapter of a tied model     that changes head or embedding alone: the head is separate from then on
tied and separate together     the tied ones get their embedding as head: exact, the output stores both
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import printable

from .adapter import Adapter
from .checkpoint import Checkpoint, Reader, natural_order
from .config_defaults import is_tied
from .config_keys import TIE, is_allowed

__all__ = ["check_copies", "copies_of", "same_heads", "tied_copies", "with_adapted_head", "without_copy"]

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
Entry = TypeVar("Entry")


def _embedding(model: Checkpoint) -> str | None:
    return next((name for name in model.tensors if name.endswith(EMBEDDINGS)), None)


def _head(model: Checkpoint) -> str | None:
    return next((name for name in HEADS if name in model.tensors), None)


def _has_no_head(model: Checkpoint) -> bool:
    """Whether an architecture scores or classifies, and so has no output head over tokens."""
    return "Classification" in str(model.config.get("architectures"))


def tied_copies(model: Checkpoint) -> dict[str, str]:
    """Return stored copies of tensors that the configuration ties: {copy: original}."""
    head, embedding = _head(model), _embedding(model)
    tied = head and embedding and is_tied(model.config) and not _has_no_head(model)
    return {head: embedding} if tied and head and embedding else {}


def without_copy(model: Checkpoint) -> Checkpoint:
    """Return the model without a stored copy of its tied embedding, which is kept aside to be checked."""
    copies = tied_copies(model)
    kept = {name: tensor for name, tensor in model.tensors.items() if name not in copies}
    pairs = tuple((model.tensors[copy], model.tensors[original]) for copy, original in copies.items())
    return replace(model, tensors=kept, copies=pairs) if copies else model


def with_adapted_head(model: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the model with a separate head if the adapter changes a tied head or its embedding alone.

    peft trains both on their own: the other one keeps the weights of the base.
    """
    embedding = _embedding(model)
    if embedding is None or _head(model) or _has_no_head(model) or not is_tied(model.config):
        return model
    changed = {*adapter.updates, *adapter.replaced}
    saved = [str(name) for name in adapter.config.get("modules_to_save") or ()]
    alone = embedding in adapter.updates or any(
        embedding in adapter.replaced and f"{name}.weight" in embedding for name in saved
    )
    if changed & set(HEADS) or (alone and not adapter.config.get("ensure_weight_tying")):
        return replace(_untied(model, HEADS[0]), has_own_head=True)
    return model


def _untied(model: Checkpoint, head: str) -> Checkpoint:
    """Return a tied model with its embedding as a separate head."""
    embedding = _embedding(model)
    if embedding is None:
        raise InputError(f"{model} has no embedding of a known name", "merge models of one architecture")
    updates = dict(model.updates)
    if embedding in updates:
        updates[head] = updates[embedding]
    return replace(model, tensors=_sorted({**model.tensors, head: model.tensors[embedding]}), updates=updates)


def _sorted(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: entries[name] for name in sorted(entries, key=natural_order)}


def same_heads(
    inputs: Sequence[Checkpoint], first: Checkpoint, allowed: Collection[str] = ()
) -> tuple[list[Checkpoint], JsonObject, list[str]]:
    """Return the inputs with a separate head in all or in none, changes of config.json, and notes.

    first    the model whose configuration the output has
    allowed  keys of config.json that may differ
    Raises InputError for a model that lacks its head, and for models of which only some tie it by their configuration.
    """
    if any(map(_has_no_head, inputs)):
        return list(inputs), {}, []
    for model in inputs:
        if not is_tied(model.config) and not _head(model) and _embedding(model):
            raise InputError(
                f"{model} has no {HEADS[0]}, and its configuration does not tie the head to the embedding",
                f'restore the tensor, or set "{TIE}" to true in its config.json',
            )
    apart = [model for model in inputs if model.has_own_head or not is_tied(model.config)]
    tied = [model for model in inputs if model not in apart]
    stated = [model for model in apart if not model.has_own_head]
    if stated and len(stated) < len(inputs) and not is_allowed(TIE, allowed):
        other = next(model for model in inputs if model not in stated)
        pair = sorted((stated[0], other), key=inputs.index)
        values = ", ".join(f"{is_tied(model.config)} in {model}" for model in pair)
        raise InputError(
            f"{TIE} differs: {values}", f"merge them with a separate head in the output: --allow-config {TIE}"
        )
    if not apart:
        return list(inputs), {}, []
    head = next(name for name in map(_head, apart) if name)
    found = [_untied(model, head) if model in tied else model for model in inputs]
    adapted = [model.role for model in apart if model.has_own_head]
    notes = [f"the adapter of {role} changes {head} or its embedding alone" for role in adapted]
    notes += [f"{stated[0].role} has its own {head}: allowed"] if stated and len(stated) < len(inputs) else []
    changes = {TIE: False} if is_tied(first.config) else {}
    return found, changes, [f"{'; '.join(notes)}: the output stores both ({TIE}: false)"] if notes else []


def copies_of(inputs: Sequence[Checkpoint]) -> list[str]:
    """Return a line for each copy of an embedding that inputs store: "lm_head.weight repeats ... in model 2"."""
    found: dict[str, list[str]] = {}
    for model in inputs:
        for copy, kept in model.copies:
            found.setdefault(f"{copy.name} repeats {kept.name}", []).append(model.role)
    return [f"{line} in {', '.join(roles)}" for line, roles in found.items()]


def check_copies(model: Checkpoint, reader: Reader) -> None:
    """Require that a dropped copy of the embedding is equal to it: dropping other values would lose weights."""
    for copy, kept in model.copies:
        if (copy.dtype, copy.shape) != (kept.dtype, kept.shape) or not reader.same(copy, kept):
            raise InputError(
                f"{model}: {printable(copy.name)} differs from {printable(kept.name)}, though config.json ties them",
                f'set "{TIE}" to false, or remove the wrong one',
            )
