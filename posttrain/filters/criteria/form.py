"""Filters on the form of an answer: empty, cut off, too short or too long, caught in a loop.

Repetition is the share of a turn's word n-grams that occurred before in the same turn (Rae et al. 2021, 2112.11446,
table A1, count shares of duplicate n-grams). Rows of numbers are data, whose repeats are not loops: lists in brackets,
lines of a matrix, lines of a hex dump are left out. Texts that words do not describe (one endless word, rows of signs)
are measured by character n-grams instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma2.posttrain.schemas import FilterConfig

from .sample import Sample, words_of

__all__ = ["empty", "length", "repeated_share", "repetition", "truncated"]

WORDS, CHARACTERS = 4, 10  # n; ten characters do not repeat by chance in keys or sequences of four letters
FEWEST_NGRAMS = 24  # shorter turns repeat themselves by chance: lists, verses, sums
SEEN = 20_000  # characters of a run without spaces; more would not change the result
ENDLESS = 0.9  # a high limit, because the rules of tables are long lines of one sign too
LONG_WORD = 60  # characters; a loop without spaces is one long word
BRACKETED = re.compile(r"\[[\s\da-fx.,;+\-\[\]]+\]|\{[\s\da-fx.,;+\-{}]+\}", re.IGNORECASE)
HEX_BYTES = re.compile(r"\b(?:[\da-f]{2}[ \t\n]){15,}[\da-f]{2}\b", re.IGNORECASE)
HEX_LINE = re.compile(r"[ \t]*[\da-f]{4,8}:?[ \t]+(?:[\da-f]{2,4}[ \t]+){4}", re.IGNORECASE)
CELL = re.compile(r"[^\s,;&|\\]+")
NUMERAL = re.compile(r"[-+]?[\da-fx]*\d[\da-f.]*", re.IGNORECASE)
CELLS = range(3, 33)  # numbers in a line of a matrix
CLOSED = re.compile(r"""[.!?…。!?।؟)\]}>"'”’»`*|$%]\s*$|[\U0001f300-\U0001faff\u2600-\u27bf]\ufe0f?\s*$""")


def empty(sample: Sample) -> str | None:
    """Report a row without a prompt, without an answer, or with an empty answer."""
    if not any(text.strip() for text in sample.user_turns):
        return "no prompt"
    if not sample.model_turns:
        return "no answer"
    return None if all(text.strip() for text in sample.model_turns) else "an empty answer"


def truncated(sample: Sample, require_ending: bool) -> str | None:
    """Report an answer that was cut off, by finish_reason and by the end of the model's last turn."""
    if sample.truncated:
        return "finish_reason is length"
    if require_ending and sample.model_turns and not CLOSED.search(sample.model_turns[-1]):
        return "no closing punctuation"
    return None


def length(sample: Sample, config: FilterConfig) -> str | None:
    """Report answers, all turns of the model together, outside the bounds on words and characters."""
    sizes = {"words": sum(map(len, sample.model_words)), "chars": sum(map(len, sample.model_turns))}
    for unit, size in sizes.items():
        low, high = getattr(config, f"min_{unit}"), getattr(config, f"max_{unit}")
        if low is not None and size < low:
            return f"{size} {unit}, fewer than {low}"
        if high is not None and size > high:
            return f"{size} {unit}, more than {high}"
    return None


def repetition(sample: Sample, limit: float) -> str | None:
    """Report a turn of the model that repeats itself."""
    for text, words in zip(sample.model_turns, sample.model_words, strict=True):
        # Every distinct word except the last three begins a new n-gram: with many of them there is no room for a loop.
        share = 0.0 if len(set(words)) - WORDS >= (1 - limit) * len(words) else repeated_share(words, WORDS)
        if share > limit:
            share = repeated_share(words_of(_without_data(text)), WORDS)
        if share > limit:
            return f"{share:.2f} of the {WORDS}-grams of words are repeated"
        share = max((repeated_share(run, CHARACTERS) for run in _unspaced(text, words)), default=0.0)
        if share > max(limit, ENDLESS):
            return f"{share:.2f} of the {CHARACTERS}-grams of characters are repeated"
    return None


def repeated_share(items: Sequence[str], n: int) -> float:
    """Return the share of the n-grams of a sequence that occurred before in it; 0 for short sequences."""
    count = len(items) - n + 1
    if count < FEWEST_NGRAMS:
        return 0.0
    return 1 - len(set(zip(*(items[i:] for i in range(n)), strict=False))) / count


def _without_data(text: str) -> str:
    """Return a text without lists of numbers in brackets, lines of a matrix and hex dumps."""
    text = HEX_BYTES.sub(" ", BRACKETED.sub(" ", text))
    return "\n".join(line for line in text.split("\n") if not _is_data(line))


def _is_data(line: str) -> bool:
    cells = CELL.findall(line[:SEEN])
    return HEX_LINE.match(line) is not None or (len(cells) in CELLS and all(map(NUMERAL.fullmatch, cells)))


def _unspaced(text: str, words: Sequence[str]) -> list[str]:
    """Return the texts that words do not describe: endless words, or a text of signs with hardly a word in it."""
    if LONG_WORD * (len(words) + 1) < 2 * len(text):
        return [text[:SEEN]]
    return [word[:SEEN] for word in words if len(word) > LONG_WORD]
