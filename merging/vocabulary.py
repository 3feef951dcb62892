"""Models whose tokenizers differ: whose vocabulary the output has, and which row each model gives to each token.

The embedding and an output head of its own have one row per id. A model whose ids differ from the output's is read
through a row map. Row i of the output is, for each model:

    a token that the model has     its row of that token
    a token that it has not        the row of the base, else of the model whose tokenizer is chosen, else of the first
                                   model that has it: there its task vector is zero, or all agree
    no token (a padding row)       its own row i where that has no token there either, else that of the chosen model

A union is the tokenizer of the base (else of the first model) with the added tokens of the others. Ids of the core
vocabulary and of its own added tokens stay. A new token gets the next id in the order of the inputs and of their ids:
the first is max(size of the core vocabulary, highest added id + 1), as the tokenizers library counts, which cannot
store holes. Rows without a token that lie there are used; the embedding grows only where they end.

Read from tokenizer.json alone: a tokenizer that transformers would have to convert first is refused by name.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint, read_json
from .errors import InputError, UsageError
from .header import printable
from .request import MergeRequest
from .writer import COMPANIONS

if TYPE_CHECKING:
    from .groups import Part, Source

__all__ = ["RowMap", "Vocabulary", "choose_vocabulary", "read_through", "vocabulary_tensors", "write_tokenizer"]

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")


@dataclass(frozen=True, eq=False)
class RowMap:
    """Rows of the output as runs of consecutive rows of the inputs.

    count   rows of the output
    starts  (R,) int64: the row of the output at which a run begins, ascending from 0
    models  (R,) int64: whose rows, an index into `inputs`
    rows    (R,) int64: the first of them there
    """

    count: int
    starts: NDArray[np.int64]
    models: NDArray[np.int64]
    rows: NDArray[np.int64]
    inputs: tuple[Checkpoint, ...]

    def pieces(self, first: int, count: int, width: int) -> Iterator[tuple[Checkpoint, int, int]]:
        """Elements [first, first + count) of the output as (input, first element there, number), `width` in a row."""
        run = int(np.searchsorted(self.starts, first // width, side="right")) - 1
        end = first + count
        while first < end:
            begin = int(self.starts[run])
            next_row = int(self.starts[run + 1]) if run + 1 < len(self.starts) else self.count
            stop = min(end, next_row * width)
            there = (int(self.rows[run]) - begin) * width + first
            yield self.inputs[self.models[run]], there, stop - first
            first, run = stop, run + 1

    @cached_property
    def digest(self) -> str:
        """Of the map and the files that it reads."""
        digest = hashlib.blake2b(str([str(file) for model in self.inputs for file in model.files]).encode())
        for array in (self.starts, self.models, self.rows):
            digest.update(array.tobytes())
        return f"{self.count} {digest.hexdigest()}"


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokenizer of an input: tokenizer.json as it is, the id of each token, and the rows of its embedding."""

    model: Checkpoint
    file: Mapping[str, Any]
    ids: Mapping[str, int]
    rows: int

    @cached_property
    def names(self) -> dict[int, str]:
        """The token of each row that has one."""
        return {index: token for token, index in self.ids.items() if index < self.rows}

    def row(self, token: str) -> int | None:
        """Where the embedding has a token."""
        index = self.ids.get(token)
        return index if index is not None and index < self.rows else None


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The vocabulary of an output.

    owner       whose tokenizer files it takes
    rows        of its embedding
    maps        by role of the input; None where all rows are the input's own, in place
    added       entries of tokenizer.json that are added to the owner's
    config      keys of config.json, and
    generation  of generation_config.json, that differ from the first model's
    """

    owner: Checkpoint
    inputs: tuple[Checkpoint, ...]
    rows: int
    maps: Mapping[str, RowMap | None]
    added: tuple[dict[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# --- reading ---


def vocabulary_tensors(model: Checkpoint) -> set[str]:
    """Names of the tensors that have a row per id: the embedding, and a head of its own."""
    rows = _embedding_rows(model)
    named = (name for name in model.tensors if EMBEDDINGS.search(name) or HEADS.search(name))
    return {name for name in named if model.tensors[name].shape[:1] == (rows,)}


def _embedding_rows(model: Checkpoint) -> int:
    name = next((name for name in model.tensors if EMBEDDINGS.search(name)), None)
    if name is None or not model.tensors[name].shape:
        raise InputError(f"{model} has no embedding of a known name", "leave out --tokenizer")
    return model.tensors[name].shape[0]


def read_tokens(model: Checkpoint) -> Tokens:
    """The tokenizer of a model. Raises InputError where there is no tokenizer.json, or one that is malformed."""
    path = model.origin / TOKENIZER
    if not path.is_file():
        raise InputError(f"{model} has no {TOKENIZER}", "save its fast tokenizer there, or leave out --tokenizer")
    file = read_json(path)
    ids: dict[str, int] = {}
    for token, index in (*_core(path, file)[0].items(), *((e["content"], e["id"]) for e in _added(path, file))):
        if not isinstance(token, str) or type(index) is not int or index < 0:
            raise InputError(f"{path}: {printable(str(token))!r} has the id {printable(str(index))}", "restore it")
        ids.setdefault(token, index)  # the tokenizers library prefers the core vocabulary as well
    if len(set(ids.values())) < len(ids):
        twice, count = Counter(ids.values()).most_common(1)[0]
        raise InputError(f"{path} gives the id {twice} to {count} tokens", "restore the file")
    return Tokens(model, file, ids, _embedding_rows(model))


def _core(path: Path, file: Mapping[str, Any]) -> tuple[dict[str, int], Any]:
    """The ids of the core vocabulary, and what else decides them: merges of BPE in one spelling, scores of unigram."""
    model = file.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in vocabulary):
        return {entry[0]: index for index, entry in enumerate(vocabulary)}, vocabulary
    merges = (model.get("merges") if isinstance(model, dict) else None) or []
    if not isinstance(vocabulary, dict) or not all(isinstance(merge, str | list) for merge in merges):
        raise InputError(f"{path} holds no vocabulary", "restore the file")
    return vocabulary, [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def _added(path: Path, file: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens in the order of their ids."""
    entries = file.get("added_tokens") or []
    known = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
        for entry in entries
    )
    if not known:
        raise InputError(f"{path}: added_tokens is malformed", "restore the file")
    return sorted(entries, key=lambda entry: entry["id"])


def _read_all(inputs: Iterable[Checkpoint]) -> list[Tokens]:
    """The tokenizer of every input; equal files are read once."""
    found: list[Tokens] = []
    for model in inputs:
        path = model.origin / TOKENIZER
        same = (t for t in found if path.is_file() and filecmp.cmp(t.model.origin / TOKENIZER, path, shallow=False))
        known = next(same, None)
        found.append(replace(known, model=model, rows=_embedding_rows(model)) if known else read_tokens(model))
    return found


# --- choosing ---


def choose_vocabulary(request: MergeRequest, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Vocabulary:
    """What `request.tokenizer` asks for. Raises UsageError or InputError for a choice that cannot be had."""
    choice = request.tokenizer or ""
    operands = _read_all((*((base,) if base else ()), *models))
    owner = operands[_owner(choice, request, base)]
    added, notes = _union(owner, operands) if choice == "union" else ((), [])
    ids = {**owner.ids, **{entry["content"]: entry["id"] for entry in added}}
    rows = max(owner.rows, *(entry["id"] + 1 for entry in added)) if added else owner.rows
    maps, moved = _row_maps(ids, rows, owner, operands, based=base is not None)
    first = next(tokens for tokens in operands if tokens.model is models[0])
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
        notes=(*notes, *moved),
    )


def _owner(choice: str, request: MergeRequest, base: Checkpoint | None) -> int:
    """The place of the chosen input among the base, where there is one, and the models."""
    if choice == "base" and base is None:
        raise UsageError("--tokenizer base: this merge has no base", "give --tokenizer union or the path of a model")
    if choice in ("base", "union"):
        return 0
    paths = [*([request.base] if request.base else []), *request.models]
    for same in (lambda path: path == Path(choice), lambda path: path.resolve() == Path(choice).resolve()):
        for number, path in enumerate(paths):
            if same(path):
                return number
    raise UsageError(f"--tokenizer {choice} is none of the inputs", "give base, union, or an input as it is named")


def _union(owner: Tokens, operands: Sequence[Tokens]) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """Entries to add to the owner's tokenizer.json, with their ids, and what to say about them."""
    path = owner.model.origin / TOKENIZER
    core = _core(path, owner.file)
    known = {entry["content"]: entry for entry in _added(path, owner.file)}
    own = len(known)
    following = max(len(core[0]), *(entry["id"] + 1 for entry in known.values())) if known else len(core[0])
    begin, notes = following, []
    for other in operands:
        place = other.model.origin / TOKENIZER
        if other.file is not owner.file and _core(place, other.file) != core:
            raise InputError(
                f"{owner.model} and {other.model} have different vocabularies or merges; "
                "a union of different vocabularies is no tokenizer",
                "choose one: --tokenizer base or the path of a model",
            )
        for entry in _added(place, other.file):
            content = entry["content"]
            if content not in known:
                new = content not in core[0]
                known[content] = entry | {"id": following if new else core[0][content]}
                following += new
            elif entry | {"id": 0} != known[content] | {"id": 0}:
                notes.append(f"{printable(content)} has other flags in {other.model.role}: the first ones are kept")
    added = tuple(list(known.values())[own:])
    _check_new(owner, begin, following)
    if following > begin:
        ids = f"id {begin}" if following == begin + 1 else f"ids {begin} to {following - 1}"
        notes.insert(0, f"tokenizer of {owner.model.role} with {_count(following - begin, 'token')} added: {ids}")
    return added, notes


def _check_new(owner: Tokens, begin: int, end: int) -> None:
    """New ids are free, and leave no row of the output without a source."""
    if begin == end:
        return
    taken = sorted(set(owner.ids.values()) & set(range(begin, end)))
    if taken or begin > owner.rows:
        why = f"its ids have holes ({taken[0]} is in use)" if taken else f"its embedding ends at row {owner.rows}"
        raise InputError(
            f"the tokenizer of {owner.model} cannot take a token of id {begin}: {why}",
            "choose one tokenizer: --tokenizer base or the path of a model",
        )


# --- row maps ---


def _row_maps(
    ids: Mapping[str, int], rows: int, owner: Tokens, operands: Sequence[Tokens], based: bool
) -> tuple[dict[str, RowMap | None], list[str]]:
    """The map of every input by its role, and a line for each that has one."""
    tokens = {index: token for token, index in ids.items() if index < rows}
    donors = [*([operands[0]] if based else []), owner, *operands]
    homes = {index: _home(token, donors, operands) for index, token in tokens.items()}
    maps: dict[str, RowMap | None] = {}
    notes = []
    for number, own in enumerate(operands):
        if own.ids is owner.ids and own.rows == rows and len(ids) == len(owner.ids):
            maps[own.model.role] = None
            continue
        place = np.full(rows, number, np.int64)
        row = np.arange(rows, dtype=np.int64)
        for index, token in tokens.items():
            there = own.row(token)
            place[index], row[index] = (number, there) if there is not None else homes[index]
        padding = np.ones(rows, bool)
        padding[list(tokens)] = False
        foreign = padding & ~_free(own, rows)
        place[foreign] = operands.index(owner)
        maps[own.model.role] = _runs(place, row, number, own.rows, operands)
        if line := _line(place, row, padding, number, operands, ids):
            notes.append(line)
    return maps, notes


def _home(token: str, donors: Sequence[Tokens], operands: Sequence[Tokens]) -> tuple[int, int]:
    """Whose row, and which, the inputs take that have none for a token."""
    for donor in donors:
        row = donor.row(token)
        if row is not None:
            return operands.index(donor), row
    raise InputError(f"no input has a row for the token {printable(token)!r}", "check the tokenizers")


def _free(own: Tokens, rows: int) -> NDArray[np.bool_]:
    """(rows,) where an input has a row without a token."""
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
    """What happens to the rows of one input, or "": "model 2: 3 tokens mapped, 1 token taken from base"."""
    own = operands[number]
    moved = int(((place == number) & (row != np.arange(len(row)))).sum())
    parts = [f"{_count(moved, 'token')} mapped"] if moved else []
    for noun, rows in (("token", ~padding), ("padding row", padding)):
        for donor, taken in sorted(Counter(place[rows & (place != number)].tolist()).items()):
            parts.append(f"{_count(taken, noun)} taken from {operands[donor].model.role}")
    dropped = sum(token not in ids for token in own.names.values())
    parts += [f"{_count(dropped, 'token')} dropped"] if dropped else []
    return f"{own.model.role}: {', '.join(parts)}" if parts else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def read_through(parts: Mapping[str, Part], vocabulary: Vocabulary) -> dict[str, Part]:
    """The parts with the tensors that have a row per id read through the maps."""
    named = {model.role: vocabulary_tensors(model) for model in vocabulary.inputs}

    def mapped(source: Source) -> Source:
        role = source.model.role
        return replace(source, rows=vocabulary.maps[role]) if source.name in named[role] else source

    return {name: replace(part, sources=tuple(map(mapped, part.sources))) for name, part in parts.items()}


# --- files of the output ---


def _generation(model: Checkpoint) -> dict[str, Any]:
    path = model.origin / GENERATION
    return read_json(path) if path.is_file() else {}


def _token_keys(
    config: Mapping[str, Any], owners: Mapping[str, Any], first: Tokens, ids: Mapping[str, int]
) -> dict[str, Any]:
    """Keys of the first model's configuration that name tokens (eos_token_id, ...) and change with the ids.

    A token that the output has not is left out; where none is left the owner's value holds.
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
    """The owner's tokenizer files, extended where tokens were added, in the place of the first model's."""
    for name in COMPANIONS:
        if name not in ("config.json", GENERATION):
            (directory / name).unlink(missing_ok=True)
            if (vocabulary.owner.origin / name).is_file():
                shutil.copyfile(vocabulary.owner.origin / name, directory / name)
    if vocabulary.generation:
        _write(directory / GENERATION, read_json(directory / GENERATION) | dict(vocabulary.generation))
    if not vocabulary.added:
        return
    file = read_json(directory / TOKENIZER)
    entries = [*_added(directory / TOKENIZER, file), *vocabulary.added]
    _write(directory / TOKENIZER, file | {"added_tokens": sorted(entries, key=lambda entry: entry["id"])})
    table, settings = directory / "added_tokens.json", directory / "tokenizer_config.json"
    if table.is_file():
        _write(table, read_json(table) | {entry["content"]: entry["id"] for entry in vocabulary.added})
    if settings.is_file():
        known = read_json(settings)
        if isinstance(known.get("added_tokens_decoder"), dict):
            flags = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in vocabulary.added}
            _write(settings, known | {"added_tokens_decoder": known["added_tokens_decoder"] | flags})


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
