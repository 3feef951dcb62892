"""Language of the model's turns, by py3langid (Lui & Baldwin 2012, retrained). Its probabilities are calibrated over
lengths: for a few words no language is probable, so that short answers, sums and code are not dropped on a guess.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from gemma2.core.errors import UsageError

from .sample import Sample

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

__all__ = ["check_codes", "language"]

CLOSEST = 4  # languages whose probabilities are added
NO_LANGUAGE = "zxx"  # markup, code
WINDOW = 300  # characters that are judged at once; more would add time but no certainty
APART = 100  # least characters between two windows
WINDOWS = 4  # spread evenly over the text: a quotation at the start is not its language
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)  # code has the keywords of its language, not of the writer's


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_codes(codes: tuple[str, ...]) -> None:
    """Raise UsageError for a code that the model does not know."""
    unknown = sorted(set(codes) - set(_identifier().labels))
    if unknown:
        raise UsageError(f"--language {','.join(unknown)} is not known", "give ISO 639 codes, for example en,de,zh")


def language(sample: Sample, codes: tuple[str, ...], confidence: float) -> str | None:
    """Report model turns in other languages than `codes`.

    A window of the text counts if the others among the CLOSEST languages together are at least `confidence` probable:
    neighbours such as Danish and Norwegian share the probability that the text is not English. A row is dropped if at
    least half of its windows count.
    """
    judged = [_other(window, codes) for window in _windows(FENCED.sub(" ", sample.model))]
    others = [found for found in judged if found[0] >= confidence]
    if not others or 2 * len(others) < len(judged):
        return None
    probability, code = max(others)
    return f"{code} or a neighbour of it, with probability {probability:.2f}"


def _windows(text: str) -> list[str]:
    """Return up to WINDOWS pieces of WINDOW characters, from the start to the end of a text; one for a short text."""
    count = min(WINDOWS, 1 + len(text) // (WINDOW + APART))
    if count == 1:
        return [text[:WINDOW]]
    step = (len(text) - WINDOW) / (count - 1)
    return [text[round(place * step) : round(place * step) + WINDOW] for place in range(count)]


def _other(text: str, codes: tuple[str, ...]) -> tuple[float, str]:
    """Return the probability that a text is in another language than `codes`, and the most probable language."""
    best = _identifier().rank(text)[:CLOSEST]
    return sum(share for code, share in best if code not in codes and code != NO_LANGUAGE), best[0][0]
