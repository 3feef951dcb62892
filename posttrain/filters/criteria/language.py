"""Language of the model's turns, by py3langid (Lui & Baldwin 2012, retrained). Its probabilities are calibrated over
lengths: for a few words no language is probable, so that short answers, sums and code are not dropped on a guess.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from gemma2.core.errors import UsageError

from .sample import Sample

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

__all__ = ["check_codes", "language"]

CLOSEST = 4  # languages whose probabilities are added
NO_LANGUAGE = "zxx"  # markup, code
READ_CHARS = 300  # of each row; the rest would add time but no certainty


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

    A row is dropped if the others among the CLOSEST languages together are at least `confidence` probable: neighbours
    such as Danish and Norwegian share the probability that the text is not English.
    """
    best = _identifier().rank(sample.model[:READ_CHARS])[:CLOSEST]
    probability = sum(share for code, share in best if code not in codes and code != NO_LANGUAGE)
    if probability < confidence:
        return None
    return f"{best[0][0]} or a neighbour of it, with probability {probability:.2f}"
