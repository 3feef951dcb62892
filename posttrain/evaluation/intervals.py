"""95 % confidence intervals from a standard error: Student's t over the independent units (prompts). Pure.

    mean -+ t(0.975, df) * se,    df = units - 1

The distribution function is the finite series for whole degrees of freedom (Abramowitz and Stegun 1972, 26.7.3 and
26.7.4), inverted by bisection; above 200 degrees of freedom the quantile is the Cornish-Fisher expansion (26.7.5),
which is exact to ten digits there.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

__all__ = ["LEVEL", "confidence_interval", "student_t"]

LEVEL = 0.95
SERIES_UP_TO = 200  # degrees of freedom


def central_probability(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with `df` degrees of freedom."""
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    total, term = 0.0, cosine if odd else 1.0
    for k in range(1, (df - odd) // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k - 1 + odd) / (2 * k + odd)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@lru_cache(maxsize=1024)
def student_t(probability: float, df: int) -> float:
    """The quantile of Student's t: P(T <= result) = probability, for probability >= 1/2 and df >= 1."""
    if df > SERIES_UP_TO:
        return _expansion(NormalDist().inv_cdf(probability), df)
    low, high = 0.0, math.pi / 2  # in the angle atan(t / sqrt(df)), which is bounded
    for _ in range(60):
        middle = (low + high) / 2
        short = central_probability(math.tan(middle) * math.sqrt(df), df) < 2 * probability - 1
        low, high = (middle, high) if short else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(df)


def _expansion(z: float, df: int) -> float:
    """Cornish-Fisher from the normal quantile z, four terms in 1 / df."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    result: float = z + sum(term / df**power for power, term in enumerate(terms, start=1))
    return result


def confidence_interval(
    mean: float, se: float, units: int, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float] | None:
    """(low, high) at 95 %, both cut to what the quantity can be; None where the error is unknown.

    units: independent observations behind the standard error.
    """
    if units < 2 or not (math.isfinite(mean) and math.isfinite(se)):
        return None
    reach = student_t((1 + LEVEL) / 2, units - 1) * se
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in (mean - reach, mean + reach))
    return low, high
