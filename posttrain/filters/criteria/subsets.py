"""Kinds of answers that may be kept: attribution, hedging, refusals.

The Gemma 2 report adds "subsets of data that encourage better in-context attribution, hedging, and refusals to minimize
hallucinations" (section 4). `keep` names subsets that the OVERRIDDEN filters do not drop. The subset `refusal` consists
of answers that admit a limit of knowledge or means; the cap on refusals counts every refusal to answer (`refusals.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gemma2.core.errors import UsageError

from .sample import Sample

__all__ = ["OVERRIDDEN", "Subsets"]

# Filters on style. Personal data, unsafe answers, false names, duplicates and overlap are dropped also in kept subsets.
OVERRIDDEN = frozenset({"length", "disclaimer", "refusal"})

PATTERNS = {
    "attribution": (
        r"\baccording to (?!me\b|my\b)"
        r"|\bas (?:reported|stated|described|noted|mentioned|shown|cited) (?:by|in)\b"
        r"|\b(?:based on|from) the (?:given |provided |above )?(?:passage|text|document|article|context|excerpt)s?\b"
        r"|\bthe (?:passage|text|document|article|context|excerpt|author|study|report)s?"
        r" (?:states?|says?|mentions?|notes?|reports?|describes?|explains?)\b"
        r"|\(source:"
    ),
    "hedging": (
        r"\bi(?:'m| am) not (?:entirely |completely |quite |absolutely |really )?(?:sure|certain)\b"
        r"|\bi(?:'m| am) (?:unsure|uncertain)\b"
        r"|\bi (?:could|might|may) be (?:wrong|mistaken)\b"
        r"|\bi (?:do not|don't|cannot|can't) (?:say|tell|know) (?:for (?:sure|certain)|with certainty)\b"
        r"|\bto the best of my knowledge\b|\bas far as i know\b|\bi (?:believe|think) (?:it|this|that)\b"
        r"|\bit(?:'s| is) (?:possible|unclear|not clear|hard to say|difficult to say)\b"
    ),
    "refusal": (
        r"\bi (?:do not|don't|cannot|can't) (?:know|recall)\b(?! (?:for|with) )"
        r"|\bi (?:do not|don't) have (?:any |enough |sufficient |specific |reliable |up-to-date |real-time |current "
        r"|access to |the ability to |personal ){0,3}(?:information|data|knowledge|details|access|records?|context"
        r"|browse|opinions?|experiences?)\b"
        r"|\bi(?:'m| am) (?:not aware of|not familiar with|unable to (?:verify|confirm|find|browse|access))\b"
        r"|\bi (?:cannot|can't|can not) (?:verify|confirm|browse|access|look up|see|find)\b"
    ),
}


class Subsets:
    """The subsets that are kept: built-in ones by name, and the user's own patterns."""

    def __init__(self, names: Sequence[str], patterns: Mapping[str, str]) -> None:
        taken = sorted(set(names) & set(patterns))
        if taken:
            raise UsageError(f"keep_patterns.{taken[0]} is also a subset of --keep", "give it another name")
        self._patterns = {name: re.compile(PATTERNS[name], re.IGNORECASE) for name in names}
        for name, pattern in patterns.items():
            try:
                self._patterns[name] = re.compile(pattern, re.IGNORECASE)
            except re.error as error:
                raise UsageError(f"keep_patterns.{name} is not a regular expression ({error})", "fix it") from error
        self.names = list(self._patterns)

    def of(self, sample: Sample) -> list[str]:
        """Return the names of the subsets to which the model's turns belong."""
        text = _straight(sample.model)
        return [name for name, pattern in self._patterns.items() if pattern.search(text)]


def _straight(text: str) -> str:
    return text.replace("’", "'")
