"""One row as the filters read it: its turns with their speakers, as text and as words.

Words are runs of letters and digits, case folded (NFC), apostrophes included; in scripts without spaces every
character is a word. A word's id is 64 bits of BLAKE2b, the same in every process.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemma2.posttrain.data.rows import conversation_of, located
from gemma2.posttrain.data.shapes.turns import check_order, fold_system
from gemma2.posttrain.data.sources import Row

__all__ = ["MODEL_ROLES", "Sample", "normal", "quoted", "sample_of", "word_ids", "words_of"]

MODEL_ROLES = ("assistant", "model")
# Han, kana, Hangul, Thai, Lao, Khmer, Burmese: no spaces between words.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
ASCII_WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+(?:['’][^\W_{UNSPACED}]+)*")
REMEMBERED_WORDS = 1 << 19  # about 60 MB


class _WordIds(dict[str, int]):
    """Word -> 64-bit id; computed on first use, cleared when there are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= REMEMBERED_WORDS:
            self.clear()
        found = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = found
        return found


_IDS = _WordIds()


@dataclass
class Sample:
    """A row's turns. All turns that are not the model's count as the user's, system text included."""

    turns: list[tuple[bool, str]]  # (said by the model, text)
    truncated: bool = False  # finish_reason is "length"

    @cached_property
    def user_turns(self) -> list[str]:
        """Return the texts to the model."""
        return [text for ours, text in self.turns if not ours]

    @cached_property
    def model_turns(self) -> list[str]:
        """Return the texts of the model."""
        return [text for ours, text in self.turns if ours]

    @cached_property
    def model(self) -> str:
        """Return the model's turns as one text."""
        return "\n".join(self.model_turns)

    @cached_property
    def whole(self) -> str:
        """Return all turns as one text."""
        return "\n".join(text for _, text in self.turns)

    @cached_property
    def words(self) -> list[list[str]]:
        """Return the words of every turn."""
        return [words_of(text) for _, text in self.turns]

    @cached_property
    def model_words(self) -> list[list[str]]:
        """Return the words of every turn of the model."""
        return [words for (ours, _), words in zip(self.turns, self.words, strict=True) if ours]

    @cached_property
    def model_vocabulary(self) -> set[str]:
        """Return the distinct words of the model's turns."""
        return set().union(*self.model_words)

    @cached_property
    def ids(self) -> list[NDArray[np.uint64]]:
        """Return the ids of the words of every turn."""
        return [word_ids(words) for words in self.words]

    def chosen(self, side: str) -> list[int]:
        """Return indices of the turns of a side: `"prompt"`, `"completion"` or `"both"`."""
        return [i for i, (ours, _) in enumerate(self.turns) if side == "both" or ours == (side == "completion")]


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def word_ids(words: Sequence[str]) -> NDArray[np.uint64]:
    """Return (W,) ids of W words."""
    return np.fromiter(map(_IDS.__getitem__, words), dtype=np.uint64, count=len(words))


def normal(text: str) -> str:
    """Return a text in one case and Unicode form, with single spaces: differences that do not change the meaning."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def quoted(text: str, place: int) -> bool:
    """Whether a position is inside quotation marks that were opened in the same line."""
    line = text[text.rfind("\n", 0, place) + 1 : place]
    if line.count('"') % 2 == 1 or line.count("“") > line.count("”") or line.count("«") > line.count("»"):
        return True
    return line[-1:] in ("'", "‘") and not line[-2:-1].isalnum()


def sample_of(row: Row, ignored: Collection[str] = (), ordered: bool = True) -> Sample:
    """Return the turns of a row; empty ones are accepted here.

    ignored  keys of messages that are left out
    ordered  whether the turns must be in an order that Gemma's template takes

    Raises InputError if the row is not a conversation, TurnError for turns that `gemma2 sft` would refuse.
    """
    found = conversation_of(row, ignored, empty=True)
    if ordered:
        with located(row.where):
            check_order(fold_system(found.messages), ends_with="assistant")
    return Sample([(turn["role"] == "assistant", turn["content"]) for turn in found.messages], found.truncated)
