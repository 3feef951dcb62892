"""The old rows that the row of each new token is made from.

    kept      the old tokenizer has the token: by its content if it is special; otherwise by content and text, or by the
              one old token that its text is cut into. Its row.
    averaged  the old tokenizer cuts the text of the token into several pieces. The mean of their rows.
    none      neither: a special token that is new, a part of a character, an id without a token. The mean of all rows
              of old tokens.

The text of a token is what it adds behind another one when the new tokenizer decodes both: `decode` alone strips
leading spaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

__all__ = ["RowSources", "ids_of", "read_tokenizer", "row_sources"]

Texts = Callable[[int], str]
KEPT, AVERAGED, NONE = "kept", "averaged", "none"
BROKEN = "\ufffd"  # what bytes that are not a whole character decode to


@dataclass(frozen=True)
class RowSources:
    """rows: of each new id the old rows of which it is the mean; () for the mean of all. kinds: of each new id.

    known  the old rows that belong to a token
    """

    rows: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    known: tuple[int, ...]

    @property
    def counts(self) -> dict[str, int]:
        """The number of new rows of each kind."""
        found = Counter(self.kinds)
        return {kind: found[kind] for kind in (KEPT, AVERAGED, NONE)}

    @property
    def pieces(self) -> float:
        """The mean number of old tokens in an averaged one."""
        sizes = [len(rows) for rows, kind in zip(self.rows, self.kinds, strict=True) if kind == AVERAGED]
        return sum(sizes) / len(sizes) if sizes else 0.0


def read_tokenizer(folder: Path, role: str) -> Tokenizer:
    """Return the tokenizer of a directory. Raises InputError if it has no tokenizer.json, or a broken one."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{role} {folder} has no tokenizer.json", "save its fast tokenizer there")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise InputError(f"{path} is not a tokenizer ({' '.join(str(error).split())[:100]})", "restore it") from error


def ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the id of every token."""
    found: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return found


def row_sources(old: Tokenizer, new: Tokenizer, old_rows: int) -> RowSources:
    """Return the old rows of each new id. Rows from `old_rows` on do not exist."""
    old_ids, new_ids = ids_of(old), ids_of(new)
    names = {index: token for token, index in new_ids.items()}
    special = {token.content for token in new.get_added_tokens_decoder().values() if token.special}
    unknown = {old_ids[token] for token in _unknown_tokens(old) if token in old_ids}
    texts = _texts(new), _texts(old)
    found = [_sources(index, names.get(index), special, old, old_ids, texts) for index in range(max(names) + 1)]
    usable = [rows if all(row < old_rows and row not in unknown for row in rows) else () for rows in found]
    for index, rows in enumerate(found):  # the unknown token itself, if both have it
        if len(rows) == 1 and rows[0] < old_rows and names.get(index) in old_ids:
            usable[index] = rows
    kinds = tuple(NONE if not rows else KEPT if len(rows) == 1 else AVERAGED for rows in usable)
    return RowSources(tuple(usable), kinds, tuple(sorted({row for row in old_ids.values() if row < old_rows})))


def _sources(
    index: int,
    token: str | None,
    special: set[str],
    old: Tokenizer,
    old_ids: Mapping[str, int],
    texts: tuple[Texts, Texts],
) -> tuple[int, ...]:
    """Return the old rows of one new id; texts: of the ids of the new and of the old tokenizer."""
    if token is None:
        return ()
    same = old_ids.get(token)
    if token in special:
        return () if same is None else (same,)
    text = texts[0](index)
    if same is not None and texts[1](same) == text:
        return (same,)
    if not text or BROKEN in text:
        return ()  # <0xE2>: a byte has no text
    return tuple(old.encode(text, add_special_tokens=False).ids)


def _texts(tokenizer: Tokenizer) -> Texts:
    """Return a function from an id to the text that it adds behind another token."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    words = (
        i for token, i in sorted(ids_of(tokenizer).items()) if i not in special and token.isascii() and token.isalpha()
    )
    anchor = next(words, None)
    before = [anchor] if anchor is not None else []
    start: str = tokenizer.decode(before, skip_special_tokens=False)

    def text_of(index: int) -> str:
        text: str = tokenizer.decode([*before, index], skip_special_tokens=False)
        return text[len(start) :] if text.startswith(start) else ""

    return text_of


def _unknown_tokens(tokenizer: Tokenizer) -> Sequence[str]:
    token = getattr(tokenizer.model, "unk_token", None)
    return [token] if isinstance(token, str) else []
