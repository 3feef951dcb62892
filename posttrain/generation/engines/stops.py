"""Stop strings: a turn ends before the first of them, wherever tokens begin and end. Torch-free.

Servers and vLLM look for them themselves; our sampler asks `stops_at` after every token. Decoding a whole turn again
for each of its tokens would cost the square of its length, so only its end is decoded, and the whole once the end holds
a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .base import LENGTH, STOP, Completion

__all__ = ["before_stop", "stops_at", "text_completion"]

SPLIT = 4  # characters that stand for a character whose first bytes are outside of what is decoded


def before_stop(stops: Sequence[str], text: str) -> str | None:
    """The text before the first of the stop strings; None where none of them occurs."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(places)] if places else None


def text_completion(drawn: Completion, stops: Sequence[str]) -> Completion:
    """A drawn completion with its text cut at a stop string and stripped.

    A cut answer has no ids: those that were drawn hold the stop string too. Its tokens and its log-prob count it.
    """
    before = before_stop(stops, drawn.text)
    if before is None:
        return replace(drawn, text=drawn.text.strip())
    reason = STOP if drawn.finish_reason == LENGTH else drawn.finish_reason
    return replace(drawn, text=before.strip(), finish_reason=reason, ids=[])


def stops_at(stops: Sequence[str], decode: Callable[[list[int]], str]) -> Callable[[list[int]], bool]:
    """A function that says whether the text of some ids holds a stop string, given that without the last id it did not.

    The end that is decoded has at least as many characters before the last token as the longest stop string.
    """
    longest = max(map(len, stops))

    def ends(ids: list[int]) -> bool:
        size = longest + 2
        while size < len(ids) and len(decode(ids[-size:-1])) < longest + SPLIT:
            size *= 2
        end = decode(ids[-size:])
        return any(stop in end for stop in stops) and before_stop(stops, decode(ids)) is not None

    return ends
