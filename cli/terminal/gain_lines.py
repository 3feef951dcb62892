"""The headline of a front on the screen: the chosen model over the start of RL and over the best single run."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from gemma2.core.json_files import JsonMapping

from .console import Console

__all__ = ["show_gains"]


def show_gains(console: Console, chosen: JsonMapping, points: Sequence[JsonMapping]) -> None:
    """Print what the chosen model gains, in words, with errors; nothing where it is not known. points: of the front."""
    from gemma2.posttrain.reports.plots.gains import GAINS_NOTE, gain_sentences
    from gemma2.posttrain.reports.plots.values import start_of

    sentences = list(gain_sentences(chosen, start_of(points)))
    if sentences:
        width = console.width(100)
        console.text("\n" + "\n".join(fill(sentence, width) for sentence in (*sentences, GAINS_NOTE)) + "\n")
