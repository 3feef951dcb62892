"""Overlap with evaluation sets: a row that shares n consecutive words with an evaluation text (Brown et al. 2020,
2005.14165, appendix C; n = 13) is contaminated.

A question of fewer than n words counts if a user turn is that question. Short answers do not count: an answer "7" does
not show that the test leaked. n-grams that occur in more than TEMPLATE rows of a set are instructions, not items.
n-grams are compared by 64-bit hashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import InputError
from gemma2.posttrain.data.sources import Row, evaluation_files, rows_of

from .sample import MODEL_ROLES, Sample, normal, word_ids, words_of

__all__ = ["EvaluationTexts", "contaminated", "ngram_hashes", "read_evaluation"]

TEMPLATE = 10  # rows
QUESTION_COLUMNS = ("prompt", "messages", "question", "problem", "instruction", "query", "input", "text")
BREAK = np.zeros(1, dtype=np.uint64)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: a polynomial over 2^64


@dataclass(frozen=True)
class EvaluationTexts:
    """The texts that rows must not overlap: sorted n-gram hashes, and whole short questions."""

    n: int
    ngrams: NDArray[np.uint64]
    questions: frozenset[str]


def ngram_hashes(ids: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Return (max(W - n + 1, 0),) hashes of the n-grams that begin at each of the (W,) word ids.

    A polynomial modulo 2^64, built by doubling: hash(a + b words) = hash(a) M^b + hash(the b words after them).
    """
    count = len(ids) - n + 1
    if count <= 0:
        return ids[:0]
    hashes, length = ids, 1
    for bit in f"{n:b}"[1:]:
        hashes = hashes[: len(hashes) - length] * _power(length) + hashes[length:]
        length *= 2
        if bit == "1":
            hashes = hashes[: len(ids) - length] * MULTIPLIER + ids[length:]
            length += 1
    return hashes ^ (hashes >> np.uint64(29))


@cache
def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(int(MULTIPLIER), exponent, 1 << 64))


def read_evaluation(paths: Iterable[Path], n: int) -> EvaluationTexts:
    """Read the evaluation texts of data paths. Raises InputError for a row without a question column."""
    ngrams: list[NDArray[np.uint64]] = []
    questions: set[str] = set()
    for path in paths:
        rows: Counter[int] = Counter()
        for row in rows_of(evaluation_files(path)):
            asked, others = _texts(row)
            seen: set[int] = set()
            for text in [*asked, *others]:
                seen.update(ngram_hashes(word_ids(words_of(text)), n).tolist())
            rows.update(seen)
            questions.update(_bare(text) for text in asked if 0 < len(words_of(text)) < n)
        ngrams.append(np.array([gram for gram, count in rows.items() if count <= TEMPLATE], dtype=np.uint64))
    return EvaluationTexts(n, np.unique(np.concatenate(ngrams)), frozenset(questions))


def contaminated(sample: Sample, evaluation: EvaluationTexts) -> str | None:
    """Return the overlap of a row: short questions among the user's turns, n-grams in all turns."""
    for text in sample.user_turns:
        if _bare(text) in evaluation.questions:
            return "asks a question of an evaluation set"
    if len(evaluation.ngrams) == 0:
        return None
    # A word that occurs in no text separates two turns: words of different turns are not consecutive.
    joined = np.concatenate([part for ids in sample.ids for part in (ids, BREAK)])
    hashes = ngram_hashes(joined, evaluation.n)
    places = np.searchsorted(evaluation.ngrams, hashes)
    places[places == len(evaluation.ngrams)] = 0
    shared = int(np.count_nonzero(evaluation.ngrams[places] == hashes))
    return f"shares {shared} {evaluation.n}-grams with an evaluation set" if shared else None


def _bare(text: str) -> str:
    return normal(text).strip(" .?!:;,\"'")


def _texts(row: Row) -> tuple[list[str], list[str]]:
    """Return (questions, other texts) of a row of an evaluation set."""
    column = next((name for name in QUESTION_COLUMNS if row.columns.get(name)), None)
    if column is None:
        raise InputError(
            f"{row.where}: no column with the question in this evaluation set",
            f"name it {' or '.join(QUESTION_COLUMNS[:3])}",
        )
    asked, others = _of_column(row.columns[column])
    for name, value in row.columns.items():
        if name != column:
            others += [text for part in _of_column(value) for text in part]
    return asked, others


def _of_column(value: object) -> tuple[list[str], list[str]]:
    """Return (texts of the user, texts of the model) from a text, a list of texts or a list of messages."""
    if isinstance(value, str):
        return [value], []
    asked: list[str] = []
    answered: list[str] = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, str):
            asked.append(item)
        elif isinstance(item, dict) and isinstance(item.get("content"), str):
            (answered if item.get("role") in MODEL_ROLES else asked).append(item["content"])
    return asked, answered
