"""tokenizer.json: the id of every token, and the union of tokenizers that differ only in their added tokens.

Ids of the core vocabulary and of the first tokenizer's added tokens stay. New tokens get consecutive ids in the order
of the inputs and of their ids, beginning at max(size of the core vocabulary, highest added id + 1): the tokenizers
library counts in the same way and cannot store holes. Existing rows without a token are used first, then the embedding
grows. A token that another input only flags keeps its id; of flags that disagree the first input's are kept.
"""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.inputs.checkpoint import Checkpoint

from .row_map import embedding_rows

__all__ = ["TOKENIZER", "Tokens", "added_entries", "counted", "read_tokenizers", "union"]

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokenizer of an input: its tokenizer.json, the id of each token, and the number of rows of the embedding."""

    model: Checkpoint
    file: JsonMapping
    ids: Mapping[str, int]
    rows: int

    @cached_property
    def names(self) -> dict[int, str]:
        """The token of each row that has a token."""
        return {index: token for token, index in self.ids.items() if index < self.rows}

    def row(self, token: str) -> int | None:
        """Return the row of a token in the embedding, or None."""
        index = self.ids.get(token)
        return index if index is not None and index < self.rows else None


def _read(model: Checkpoint) -> Tokens:
    """Return the tokenizer of a model. Raises InputError if tokenizer.json is missing or malformed."""
    path = model.origin / TOKENIZER
    if not path.is_file():
        raise InputError(f"{model} has no {TOKENIZER}", "save its fast tokenizer there, or leave out --tokenizer")
    file = read_json(path)
    ids: dict[str, int] = {}
    for token, index in (*_core(path, file)[0].items(), *((e["content"], e["id"]) for e in added_entries(path, file))):
        if type(index) is not int or index < 0:
            raise InputError(f"{path}: {printable(token)!r} has the id {printable(str(index))}", "restore it")
        ids.setdefault(token, index)  # the tokenizers library prefers the core vocabulary as well
    if len(set(ids.values())) < len(ids):
        twice, count = Counter(ids.values()).most_common(1)[0]
        raise InputError(f"{path} gives the id {twice} to {count} tokens", "restore the file")
    return Tokens(model, file, ids, embedding_rows(model))


def _core(path: Path, file: JsonMapping) -> tuple[dict[str, int], object]:
    """Return the ids of the core vocabulary, and what else decides them: BPE merges in one spelling, unigram scores."""
    model = file.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list) and all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocabulary
    ):
        return {entry[0]: index for index, entry in enumerate(vocabulary)}, vocabulary
    merges = (model.get("merges") if isinstance(model, dict) else None) or []
    if not isinstance(vocabulary, dict) or not all(isinstance(merge, str | list) for merge in merges):
        raise InputError(f"{path} holds no vocabulary", "restore the file")
    return vocabulary, [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def added_entries(path: Path, file: JsonMapping) -> list[JsonObject]:
    """Return the entries of the added tokens in the order of their ids. Raises InputError if they are malformed."""
    entries = file.get("added_tokens") or []
    known = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
        for entry in entries
    )
    if not known:
        raise InputError(f"{path}: added_tokens is malformed", "restore the file")
    return sorted(entries, key=lambda entry: entry["id"])


def read_tokenizers(inputs: Iterable[Checkpoint]) -> list[Tokens]:
    """Return the tokenizer of every input; equal files are read once."""
    found: list[Tokens] = []
    for model in inputs:
        path = model.origin / TOKENIZER
        same = (t for t in found if path.is_file() and filecmp.cmp(t.model.origin / TOKENIZER, path, shallow=False))
        known = next(same, None)
        found.append(replace(known, model=model, rows=embedding_rows(model)) if known else _read(model))
    return found


def union(owner: Tokens, operands: Sequence[Tokens]) -> tuple[tuple[JsonObject, ...], list[str]]:
    """Return the entries to add to the owner's tokenizer.json, with their ids, and notes about them."""
    path = owner.model.origin / TOKENIZER
    core = _core(path, owner.file)
    known = {entry["content"]: entry for entry in added_entries(path, owner.file)}
    own = len(known)
    following = max(len(core[0]), *(entry["id"] + 1 for entry in known.values())) if known else len(core[0])
    begin, notes = following, []
    for other in operands:
        place = other.model.origin / TOKENIZER
        if other.file is not owner.file and _core(place, other.file) != core:
            raise InputError(
                f"{owner.model} and {other.model} have different vocabularies or merges, which have no union",
                "choose one: --tokenizer base or the path of a model",
            )
        for entry in added_entries(place, other.file):
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
        notes.insert(0, f"tokenizer of {owner.model.role} with {counted(following - begin, 'token')} added: {ids}")
    return added, notes


def _check_new(owner: Tokens, begin: int, end: int) -> None:
    """Check that new ids are free and leave no row of the output without a source. Raises InputError."""
    if begin == end:
        return
    taken = sorted(set(owner.ids.values()) & set(range(begin, end)))
    if taken or begin > owner.rows:
        why = f"its ids have holes ({taken[0]} is in use)" if taken else f"its embedding ends at row {owner.rows}"
        raise InputError(
            f"the tokenizer of {owner.model} cannot add a token with id {begin}: {why}",
            "choose one tokenizer: --tokenizer base or the path of a model",
        )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 token, 2 tokens."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
