"""Language of the model's turns, by py3langid (Lui & Baldwin 2012, retrained). Its probabilities are calibrated over
lengths: on a few words no language is probable, so that short answers, sums and code are not thrown away on a guess.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gemma2.core.errors import UsageError

from .sample import Sample

__all__ = ["check_codes", "language"]

CLOSEST = 4
NO_LANGUAGE = "zxx"  # markup, code
READ_CHARS = 300  # of each row; the rest adds time and no certainty


@cache
def _identifier() -> Any:  # noqa: ANN401
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_codes(codes: tuple[str, ...]) -> None:
    """Raises UsageError for a code that the model does not know."""
    unknown = sorted(set(codes) - set(_identifier().labels))
    if unknown:
        raise UsageError(f"--language {','.join(unknown)} is not known", "give ISO 639 codes, for instance en,de,zh")


def language(sample: Sample, codes: tuple[str, ...], confidence: float) -> str | None:
    """Reads the model's turns. A row stays unless others are at least `confidence` probable: the CLOSEST languages
    taken together, for neighbours such as Danish and Norwegian share what speaks against English."""
    best = _identifier().rank(sample.model[:READ_CHARS])[:CLOSEST]
    probability = sum(share for code, share in best if code not in codes and code != NO_LANGUAGE)
    if probability < confidence:
        return None
    return f"{best[0][0]} or a neighbour of it, with probability {probability:.2f}"
