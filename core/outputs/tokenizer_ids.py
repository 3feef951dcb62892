"""The ids of the tokenizers of two model directories, compared from their files. Torch-free and numpy-free."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, read_json

from .safetensors_header import printable

__all__ = ["tokenizer_difference"]


def tokenizer_difference(first: Path, other: Path) -> str:
    """The first difference in the ids of the tokenizers of two model directories, or ""; of files that both have."""
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "added_tokens.json"):
        left, right = first / name, other / name
        if left.is_file() and right.is_file() and not filecmp.cmp(left, right, shallow=False):
            difference = _first_difference(left, right) if name == "tokenizer.json" else name
            if difference:
                return difference
    return ""


def _first_difference(left: Path, right: Path) -> str:
    """Return the first difference in the ids of two tokenizer.json files (vocabulary, merges, added tokens), or "".

    The files may still differ in padding, truncation or spelling, which change no id.
    """
    ours, theirs = _ids_of(left), _ids_of(right)
    for token in ours.keys() | theirs.keys():
        if ours.get(token) != theirs.get(token):
            here, there = (printable(str(ids.get(token, "absent"))) for ids in (ours, theirs))
            return f"{printable(str(token))!r} is {here} and {there}"
    return ""


def _ids_of(path: Path) -> dict[str, int]:
    """Return {token: id} of a tokenizer.json. Raises InputError if it is malformed."""
    try:
        return dict(_token_ids(read_json(path)))
    except (AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not the description of a tokenizer", "restore the file") from error


def _token_ids(tokenizer: JsonMapping) -> Iterator[tuple[str, int]]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):  # unigram: [token, score], the id is the index
        yield from ((entry[0], index) for index, entry in enumerate(vocabulary))
    merges = model.get("merges") if isinstance(model, dict) else None
    for rank, merge in enumerate(merges or ()):
        yield f"merge {merge if isinstance(merge, str) else ' '.join(merge)}", rank
    for added in tokenizer.get("added_tokens") or ():
        yield f"{added['content']}", added["id"]
