"""Parameters of a merge that differ between tensors: by a pattern in the name, and along the depth of the model.

A gradient `[0, 0.3, 0.7, 1]` puts its points at equal distances from the first layer to the last and is linear between
them. Tensors outside the layers lie at the end that they belong to: the embedding at 0, the final norm and a head at 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Number", "Rule", "Schedule", "gradient", "value_at", "values_of"]


@dataclass(frozen=True)
class Rule:
    """points  one value for all depths, or the points of a gradient
    pattern    regular expression searched for in the tensor's name; None fits every tensor
    """

    points: tuple[float, ...]
    pattern: str | None = None

    def fits(self, name: str) -> bool:
        """Whether the rule is for this tensor."""
        return self.pattern is None or re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Schedule:
    """Rules in the order in which they are tried. `default` is the value where none fits; None: that is an error."""

    rules: tuple[Rule, ...]
    default: float | None = None


Number = float | Schedule


def gradient(points: Sequence[float], depth: float) -> float:
    """Piecewise linear through equally spaced points at `depth` in [0, 1]."""
    if len(points) == 1:
        return points[0]
    place = depth * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    low, high = list(pairwise(points))[left]
    return low + (high - low) * (place - left)


def value_at(number: Number, name: str, depth: float) -> float | None:
    """The value for one tensor at its depth in [0, 1]; None where no rule fits and no default is set."""
    if not isinstance(number, Schedule):
        return number
    for rule in number.rules:
        if rule.fits(name):
            return gradient(rule.points, depth)
    return number.default


def values_of(number: Number | None) -> tuple[float, ...]:
    """Every value that a number takes at the corners of its schedule."""
    if number is None:
        return ()
    if not isinstance(number, Schedule):
        return (number,)
    points = [point for rule in number.rules for point in rule.points]
    return (*points, *(() if number.default is None else (number.default,)))
