"""Whether a reply has the right answer: exactly, or as a number. Torch-free.

    exact     the reply equals an accepted answer after both were normalised: NFKC, lower case, without punctuation and
              the articles a, an, the, blanks squeezed (SQuAD's rule: Rajpurkar et al. 2016, 1606.05250)
    contains  the words of an accepted answer follow each other somewhere in the reply, both normalised: for models that
              answer in sentences; a reply that names every answer has the right one too
    numeric   the last number in the reply equals the number of an accepted answer; 5, 5.0, $5 and "5." are equal, and
              so are 1,000 and 1000; a fraction 3/4 is two numbers, of which the last counts

The accepted answer of a row in GSM8K's form is what follows its last `####`. `--extract` cuts the answer out of a reply
first: the first group of the expression's last match, or the whole match; a reply without a match has no answer.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

__all__ = ["accepted", "contains", "exact", "extracted", "normalised", "number_in", "numeric"]

FINAL = "####"  # in GSM8K's answers: what follows is the number
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def accepted(answer: str) -> str:
    """The final answer of a worked solution; any other answer as it is."""
    return answer.rpartition(FINAL)[2].strip() if FINAL in answer else answer.strip()


def normalised(text: str) -> str:
    """A text as it is compared."""
    plain = unicodedata.normalize("NFKC", text).lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())


def number_in(text: str) -> Decimal | None:
    """The last number in a text; None without one."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def extracted(reply: str, pattern: str | None) -> str | None:
    """The answer in a reply; None where `pattern` has no match."""
    if pattern is None:
        return reply.strip()
    matches = list(re.finditer(pattern, reply))
    if not matches:
        return None
    last = matches[-1]
    return (last[1] or "" if last.re.groups else last[0]).strip()


def exact(reply: str | None, answers: Sequence[str]) -> bool:
    """Whether a reply is one of the accepted answers."""
    return reply is not None and normalised(reply) in {normalised(accepted(answer)) for answer in answers}


def contains(reply: str | None, answers: Sequence[str]) -> bool:
    """Whether an accepted answer occurs in a reply, as whole words. One without words occurs nowhere."""
    said = f" {normalised(reply or '')} "
    wanted = [normalised(accepted(answer)) for answer in answers]
    return any(f" {answer} " in said for answer in wanted if answer)


def numeric(reply: str | None, answers: Sequence[str]) -> bool | None:
    """Whether the last number of a reply is that of an accepted answer; None where no answer has a number."""
    wanted = {number for answer in answers if (number := number_in(accepted(answer))) is not None}
    if not wanted:
        return None
    return reply is not None and number_in(reply) in wanted
