"""Offensive words in answers, by the frozen list `unsafe_words.txt`, whose first lines say where it is from.

A word counts outside quotation marks, as a whole word, also where digits and signs replace letters (b1tch, f*ck). A
list of words finds insults, slurs and obscenities but no dangerous advice, no hatred in polite words and few words of
other languages than English: use a safety model for that (`safety.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from .sample import Sample, quoted, words_of

__all__ = ["unsafe"]

REPLACED = str.maketrans("013457@$!", "oieastasi")
DISGUISED = re.compile(r"(?<!\w)[a-z]+[01345*@$!](?:[a-z*@$!01345]*[a-z])", re.IGNORECASE)
FEWEST_LETTERS = 4  # of a disguised word


@cache
def _list() -> dict[str, str]:
    """Return word or phrase -> its category."""
    entries: dict[str, str] = {}
    category = ""
    for line in files(__package__).joinpath("unsafe_words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            category = line[2:]
        elif line and not line.startswith("#"):
            entries[line] = category
    return entries


@cache
def _first_words(categories: tuple[str, ...]) -> frozenset[str]:
    """Return the first word of each entry: a text without any of them holds no entry."""
    return frozenset(words_of(entry)[0] for entry, category in _list().items() if category in categories)


@cache
def _pattern(categories: tuple[str, ...]) -> re.Pattern[str]:
    entries = sorted((entry for entry, of in _list().items() if of in categories), key=len, reverse=True)
    unspaced = [entry for entry in entries if len(words_of(entry)) == len(entry)]  # scripts whose words have no ends
    spaced = [entry for entry in entries if entry not in unspaced]
    either = "|".join(map(re.escape, unspaced)) or r"(?!)"
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, spaced))})(?!\w)|{either}", re.IGNORECASE)


def unsafe(sample: Sample, categories: tuple[str, ...], terms: int) -> str | None:
    """Report offensive words in the model's turns only: a refusal of an unsafe prompt is a good row.

    The detail names the categories, not the words.
    """
    disguised = any(DISGUISED.search(text) for text in sample.model_turns)
    if not disguised and _first_words(categories).isdisjoint(sample.model_vocabulary):
        return None
    counts = Counter(category for text in sample.model_turns for category in _found(text, categories))
    if counts.total() < terms:
        return None
    return ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))


def _found(text: str, categories: tuple[str, ...]) -> Iterator[str]:
    entries = _list()
    for found in _pattern(categories).finditer(text):
        if not quoted(text, found.start()):
            yield entries[found.group().lower()]
    for hidden in DISGUISED.finditer(text):
        category = _revealed(hidden.group().lower())
        if category in categories and not quoted(text, hidden.start()):
            yield category


def _revealed(word: str) -> str | None:
    """Return the category of the entry that a word with replaced letters stands for."""
    plain = word.translate(REPLACED)
    if len(plain) < FEWEST_LETTERS:
        return None
    entries = _list() | {"bitch": "general", "bitches": "general"}
    if "*" not in plain:
        return entries.get(plain)
    pattern = re.compile("".join("[a-z]" if sign == "*" else re.escape(sign) for sign in plain))
    return next((category for entry, category in entries.items() if pattern.fullmatch(entry)), None)
