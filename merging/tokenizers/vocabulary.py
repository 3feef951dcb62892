"""Merges of models whose tokenizers differ: the vocabulary of the output, and the row of each model for each token.

The embedding and an untied output head have one row per id. A model whose ids differ from the output's is read through
a row map. Row i of the output is, for each model:

    a token that the model has     its row of that token
    a token that it lacks          the row of the base, else of the model whose tokenizer is chosen, else of the first
                                   model that has it: its task vector is zero there, or all models agree
    no token (a padding row)       its own row i if that is a padding row too, else row i of the chosen model

A union is the tokenizer of the base (else of the first model) with the added tokens of the others: see `token_ids`.
Only tokenizer.json is read: a tokenizer that transformers would have to convert first is refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.inputs.checkpoint import COMPANIONS, Checkpoint
from gemma2.merging.methods.request import MergeRequest, TokenSource, VocabularyChoice

from .row_map import ZEROS, RowMap
from .token_ids import TOKENIZER, Tokens, added_entries, counted, read_tokenizers, union

__all__ = ["GENERATION", "Vocabulary", "choose_vocabulary", "write_json_file", "write_tokenizer"]

GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The vocabulary of an output.

    owner       model that its tokenizer files are copied from
    rows        of its embedding
    maps        by role of the input; None if the output has the input's own rows in their order
    added       entries of tokenizer.json that are added to the owner's
    config      keys of config.json that differ from the first model's
    generation  the same of generation_config.json
    choice      rows that the request names, with the roles of their models
    ids         of the output's tokens
    names       the token of each id of an input, by its role
    """

    owner: Checkpoint
    inputs: tuple[Checkpoint, ...]
    rows: int
    maps: Mapping[str, RowMap | None]
    added: tuple[JsonObject, ...] = ()
    config: JsonMapping = field(default_factory=dict)
    generation: JsonMapping = field(default_factory=dict)
    choice: VocabularyChoice | None = None
    notes: tuple[str, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


def choose_vocabulary(request: MergeRequest, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Vocabulary:
    """Return the vocabulary that `request.tokenizer` chooses. Raises UsageError or InputError if that is impossible."""
    choice = request.tokenizer or ""
    operands = read_tokenizers((*((base,) if base else ()), *models))
    owner = operands[_owner(choice, request, base)]
    added, notes = union(owner, operands) if choice == "union" else ((), [])
    ids = {**owner.ids, **{entry["content"]: entry["id"] for entry in added}}
    rows = max(owner.rows, *(entry["id"] + 1 for entry in added)) if added else owner.rows
    chosen = request.vocabulary or VocabularyChoice()
    padded = -(-rows // chosen.multiple) * chosen.multiple if chosen.multiple else rows
    sources = {source.token: _chosen_row(source, request, operands, ids) for source in chosen.tokens}
    named = [
        replace(source, model=operands[_owner(source.model, request, base)].model.role) if source.model else source
        for source in chosen.tokens
    ]
    maps, moved = _row_maps(ids, (rows, padded), sources, owner, operands, based=base is not None)
    rows = padded
    first = operands[-len(models)]
    config = _token_keys(models[0].config, owner.model.config, first, ids)
    generation = _token_keys(_generation(models[0]), _generation(owner.model), first, ids)
    return Vocabulary(
        owner=owner.model,
        inputs=tuple(tokens.model for tokens in operands),
        rows=rows,
        maps=maps,
        added=added,
        config=({"vocab_size": rows} if rows != first.rows else {}) | config,
        generation=generation,
        choice=replace(chosen, tokens=tuple(named)) if request.vocabulary else None,
        notes=(*notes, *moved, *_template(owner.model, models[0])),
        ids=ids,
        names={tokens.model.role: tokens.names for tokens in operands},
    )


def _owner(choice: str, request: MergeRequest, base: Checkpoint | None) -> int:
    """Return the index of the chosen input among the base, if there is one, and the models."""
    if choice == "base" and base is None:
        raise UsageError("--tokenizer base: this merge has no base", "give --tokenizer union or the path of a model")
    if choice in ("base", "union"):
        return 0
    paths = [*([request.base] if request.base else []), *request.models]
    for candidates, chosen in ((paths, Path(choice)), ([path.resolve() for path in paths], Path(choice).resolve())):
        if chosen in candidates:
            return candidates.index(chosen)
    raise UsageError(f"--tokenizer {choice} is not one of the inputs", "give base, union, or the path of an input")


def _template(owner: Checkpoint, first: Checkpoint) -> list[str]:
    """Return a note if the first model's chat template is lost with its tokenizer."""

    def has_one(model: Checkpoint) -> bool:
        settings = model.origin / "tokenizer_config.json"
        inside = settings.is_file() and bool(read_json(settings).get("chat_template"))
        return inside or any((model.origin / f"chat_template.{end}").is_file() for end in ("jinja", "json"))

    lost = has_one(first) and not has_one(owner)
    return [f"no chat template: that of {first.role} is not taken with the tokenizer of {owner.role}"] if lost else []


# --- row maps ---


def _chosen_row(
    source: TokenSource, request: MergeRequest, operands: Sequence[Tokens], ids: Mapping[str, int]
) -> tuple[bool, int, int]:
    """Return whether a row is for all models, and its (input, row). Raises UsageError or InputError."""
    token = printable(source.token)
    if source.token not in ids:
        raise InputError(f"the output has no token {token!r}, for which a row is chosen", "check its spelling")
    if source.model is None:
        return source.force, ZEROS, 0
    try:
        number = _owner(source.model, request, operands[0].model if request.base else None)
    except UsageError as error:
        raise UsageError(
            f"the row of {token!r} is that of {source.model}, which is not one of the inputs",
            "choose one of them",
        ) from error
    row = source.index if source.index is not None else operands[number].row(source.other or source.token)
    if row is None or not 0 <= row < operands[number].rows:
        wanted = f"row {row}" if row is not None else f"token {printable(source.other or source.token)!r}"
        raise InputError(f"{operands[number].model} has no {wanted}", "choose another model or token")
    return source.force, number, row


def _row_maps(
    ids: Mapping[str, int],
    sizes: tuple[int, int],
    sources: Mapping[str, tuple[bool, int, int]],
    owner: Tokens,
    operands: Sequence[Tokens],
    based: bool,
) -> tuple[dict[str, RowMap | None], list[str]]:
    """Return the map of every input by its role, and a note for each that has one.

    sizes    rows before and after padding with zeros
    sources  of single tokens: for all models, input and row
    """
    unpadded, rows = sizes
    tokens = {index: token for token, index in ids.items() if index < rows}
    donors = [*([operands[0]] if based else []), owner, *operands]
    maps: dict[str, RowMap | None] = {}
    notes = []
    for number, own in enumerate(operands):
        if own.ids is owner.ids and own.rows == rows and len(ids) == len(owner.ids) and not sources:
            maps[own.model.role] = None
            continue
        place = np.full(rows, number, np.int64)
        row = np.arange(rows, dtype=np.int64)
        for index, token in tokens.items():
            there = own.row(token)
            chosen = sources.get(token)
            if chosen is not None and (chosen[0] or there is None):
                place[index], row[index] = chosen[1:]
            else:
                place[index], row[index] = (number, there) if there is not None else _home(token, donors, operands)
        padding = np.ones(rows, bool)
        padding[list(tokens)] = False
        foreign = padding & ~_free(own, rows)
        place[foreign] = operands.index(owner)
        place[unpadded:] = np.where(padding[unpadded:], ZEROS, place[unpadded:])
        maps[own.model.role] = _runs(place, row, number, own.rows, operands)
        if line := _line(place, row, padding, number, operands, ids):
            notes.append(line)
    return maps, notes


def _home(token: str, donors: Sequence[Tokens], operands: Sequence[Tokens]) -> tuple[int, int]:
    """Return (input, row) for a token, taken by the inputs that lack it."""
    for donor in donors:
        row = donor.row(token)
        if row is not None:
            return operands.index(donor), row
    raise InputError(f"no input has a row for the token {printable(token)!r}", "check the tokenizers")


def _free(own: Tokens, rows: int) -> NDArray[np.bool_]:
    """Return (rows,): whether an input has a row without a token there."""
    free = np.arange(rows) < own.rows
    free[[index for index in own.names if index < rows]] = False
    return free


def _runs(
    place: NDArray[np.int64], row: NDArray[np.int64], number: int, own_rows: int, operands: Sequence[Tokens]
) -> RowMap | None:
    count = len(row)
    if count == own_rows and (place == number).all() and (row == np.arange(count)).all():
        return None
    breaks = (np.diff(place) != 0) | (np.diff(row) != 1)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1]).astype(np.int64)
    return RowMap(count, starts, place[starts], row[starts], tuple(tokens.model for tokens in operands))


def _line(
    place: NDArray[np.int64],
    row: NDArray[np.int64],
    padding: NDArray[np.bool_],
    number: int,
    operands: Sequence[Tokens],
    ids: Mapping[str, int],
) -> str:
    """Return a note on the rows of one input, or "": "model 2: 3 tokens mapped, 1 token taken from base"."""
    own = operands[number]
    moved = int(((place == number) & (row != np.arange(len(row)))).sum())
    parts = [f"{counted(moved, 'token')} mapped"] if moved else []
    for noun, rows in (("token", ~padding), ("padding row", padding)):
        for donor, taken in sorted(Counter(place[rows & (place != number)].tolist()).items()):
            origin = "filled with zeros" if donor == ZEROS else f"taken from {operands[donor].model.role}"
            parts.append(f"{counted(taken, noun)} {origin}")
    dropped = sum(token not in ids for token in own.names.values())
    parts += [f"{counted(dropped, 'token')} dropped"] if dropped else []
    return f"{own.model.role}: {', '.join(parts)}" if parts else ""


# --- files of the output ---


def _generation(model: Checkpoint) -> JsonObject:
    path = model.origin / GENERATION
    return read_json(path) if path.is_file() else {}


def _token_keys(config: JsonMapping, owners: JsonMapping, first: Tokens, ids: Mapping[str, int]) -> JsonObject:
    """Return the keys of the first model's configuration that hold ids of tokens (eos_token_id, ...) and change.

    A token that the output lacks is left out; if none is left, the owner's value is taken.
    """
    changed = {}
    for key, value in config.items():
        listed = value if isinstance(value, list) else [value]
        if not key.endswith("_token_id") or any(type(item) is not int for item in listed):
            continue
        names = [first.names.get(item) for item in listed]
        kept = [
            item if name is None else ids[name]
            for item, name in zip(listed, names, strict=True)
            if name is None or name in ids
        ]
        meant = owners.get(key) if not kept else kept if isinstance(value, list) else kept[0]
        if meant != value:
            changed[key] = meant
    return changed


def write_tokenizer(vocabulary: Vocabulary, directory: Path) -> None:
    """Replace the first model's tokenizer files by the owner's, extended by the added tokens."""
    for name in COMPANIONS:
        if name not in ("config.json", GENERATION):
            (directory / name).unlink(missing_ok=True)
            if (vocabulary.owner.origin / name).is_file():
                shutil.copyfile(vocabulary.owner.origin / name, directory / name)
    if vocabulary.generation:
        write_json_file(directory / GENERATION, read_json(directory / GENERATION) | dict(vocabulary.generation))
    if not vocabulary.added:
        return
    file = read_json(directory / TOKENIZER)
    entries = [*added_entries(directory / TOKENIZER, file), *vocabulary.added]
    write_json_file(directory / TOKENIZER, file | {"added_tokens": sorted(entries, key=lambda entry: entry["id"])})
    table, settings = directory / "added_tokens.json", directory / "tokenizer_config.json"
    if table.is_file():
        write_json_file(table, read_json(table) | {entry["content"]: entry["id"] for entry in vocabulary.added})
    if settings.is_file():
        known = read_json(settings)
        if isinstance(known.get("added_tokens_decoder"), dict):
            flags = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in vocabulary.added}
            write_json_file(settings, known | {"added_tokens_decoder": known["added_tokens_decoder"] | flags})


def write_json_file(path: Path, value: JsonMapping) -> None:
    """Write a JSON file as the files of tokenizers are written."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
