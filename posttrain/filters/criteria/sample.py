"""One row as the filters read it: who said what, as text and as words.

Words are runs of letters and digits, case folded (NFC), apostrophes inside; characters of scripts that do not write
spaces count as one word each. A word's id is 64 bits of BLAKE2b, the same in every process.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.data.rows import conversation_of
from gemma2.posttrain.data.sources import Row

__all__ = ["MODEL_ROLES", "Sample", "normal", "sample_of", "word_ids", "words_of"]

MODEL_ROLES = ("assistant", "model")
# Han, kana, Hangul, Thai, Lao, Khmer, Burmese: no spaces between words.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
ASCII_WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+(?:['’][^\W_{UNSPACED}]+)*")
REMEMBERED_WORDS = 1 << 19  # 60 MB or so


class _WordIds(dict[str, int]):
    """Word -> 64-bit id; made on first use, forgotten when there are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= REMEMBERED_WORDS:
            self.clear()
        found = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = found
        return found


_IDS = _WordIds()


@dataclass
class Sample:
    """A row's turns. `user` holds everything that the model did not say, system text included."""

    turns: list[tuple[bool, str]]  # (said by the model, text)
    truncated: bool = False  # finish_reason is "length"

    @cached_property
    def user_turns(self) -> list[str]:
        """The text of the turns addressed to the model."""
        return [text for ours, text in self.turns if not ours]

    @cached_property
    def model_turns(self) -> list[str]:
        """The text of the model's turns."""
        return [text for ours, text in self.turns if ours]

    @cached_property
    def model(self) -> str:
        """The model's turns as one text."""
        return "\n".join(self.model_turns)

    @cached_property
    def whole(self) -> str:
        """All turns as one text."""
        return "\n".join(text for _, text in self.turns)

    @cached_property
    def words(self) -> list[list[str]]:
        """The words of every turn."""
        return [words_of(text) for _, text in self.turns]

    @cached_property
    def model_words(self) -> list[list[str]]:
        """The words of every turn of the model."""
        return [words for (ours, _), words in zip(self.turns, self.words, strict=True) if ours]

    @cached_property
    def model_vocabulary(self) -> set[str]:
        """The distinct words of the model's turns."""
        return set().union(*self.model_words)

    @cached_property
    def ids(self) -> list[NDArray[np.uint64]]:
        """The ids of the words of every turn."""
        return [word_ids(words) for words in self.words]

    def chosen(self, side: str) -> list[int]:
        """Indices of the turns of a side: `"prompt"`, `"completion"` or `"both"`."""
        return [i for i, (ours, _) in enumerate(self.turns) if side == "both" or ours == (side == "completion")]


def words_of(text: str) -> list[str]:
    """The words of a text."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def word_ids(words: Sequence[str]) -> NDArray[np.uint64]:
    """(W,) uint64 ids."""
    return np.fromiter(map(_IDS.__getitem__, words), dtype=np.uint64, count=len(words))


def normal(text: str) -> str:
    """A text without what does not change its meaning: case, Unicode form, the kind and number of spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def sample_of(row: Row) -> Sample:
    """The turns of a row. Raises InputError if it is not a conversation; an empty prompt is accepted here."""
    columns: JsonObject = row.columns
    truncated = columns.get("finish_reason") == "length"
    if "messages" not in columns and _blank(columns.get("prompt")):
        row = Row(row.where, {**columns, "prompt": "(empty)"})  # the rest of the row is still checked
        turns = [{"role": "user", "content": ""}, *conversation_of(row).messages[1:]]
    else:
        turns = conversation_of(row).messages
    return Sample([(turn["role"] in MODEL_ROLES, turn["content"]) for turn in turns], truncated)


def _blank(prompt: object) -> bool:
    if isinstance(prompt, str):
        return not prompt.strip()
    if not isinstance(prompt, list) or not prompt:
        return False
    contents = [turn.get("content") for turn in prompt if isinstance(turn, dict)]
    return len(contents) == len(prompt) and all(isinstance(text, str) and not text.strip() for text in contents)
