"""Rows of bench/science.py by the judge, a program that RL never sees, in place of the learned reward. Pure.

Rewards of a learned model rise also where it is fooled. So the rows about rewards are computed once more with the
judge's marks, where a row needs no trajectory: a run on its way measured reward and KL alone. Instead of its path a run
has its end here. Definitions, errors and rule are those of findings.py. These rows were added when rewards had been
seen, so their verdicts are those of a second look.
"""

from __future__ import annotations

from collections.abc import Callable

from findings import (
    ALL,
    AT_LEAST,
    AT_MOST,
    FIXED,
    FOUR,
    LERP,
    MORE,
    ONE,
    PAIR,
    RUNS,
    SECOND,
    TWO,
    Claim,
    Finding,
    Floats,
    Seed,
    above,
    gap,
)

__all__ = ["JUDGED"]


def _difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> Callable[[Seed], Floats]:
    """Mean marks of some policies less those of others."""
    return lambda seed: seed.mean_reward(*ours) - seed.mean_reward(*theirs)


def _over_ends(merge: str) -> Callable[[Seed], Floats]:
    """The line to a merge at the KLs of the first two runs' ends, less these; beyond its end, the merge."""

    def over(seed: Seed) -> Floats:
        found: Floats = seed.line(merge).at_kls_of(seed.curve(*PAIR)).reward.mean(axis=1) - seed.mean_reward(*PAIR)
        return found

    return over


def _at_least(seed: Seed) -> Floats:
    """The second line over the first with the corners of the first."""
    return gap(seed.line(SECOND).at_kls_of(seed.line(TWO)), seed.line(TWO))


def _at_most(seed: Seed) -> Floats:
    """The second line over the first with the corners of the second."""
    return gap(seed.line(SECOND), seed.line(TWO).at_kls_of(seed.line(SECOND)))


JUDGED: dict[str, list[Finding]] = {
    "By the judge": [
        Finding("judge, SLERP − LERP", above("> 0"), _difference((TWO,), (LERP,))),
        Finding("judge, SLERP − its policies", above("> 0"), _difference((TWO,), PAIR)),
        Finding("judge, SLERP of four − its policies", above("> 0"), _difference((FOUR,), ALL)),
        Finding("judge at equal KL, line of SLERP − ends of its runs", above("> 0"), _over_ends(TWO)),
        Finding("judge at equal KL, line of SLERP of four − the same ends", above("> 0"), _over_ends(FOUR)),
        Finding("judge at the end, EMA − fixed", above("> 0"), _difference(PAIR, FIXED)),
        Finding("judge, SLERP 2 − SLERP 1", above("> 0"), _difference((SECOND,), (TWO,))),
        Finding("judge at equal KL, line 2 − line 1, at least", AT_LEAST, _at_least),
        Finding("the same, at most", AT_MOST, _at_most),
        Finding("judge, SLERP 2 − end of the long run", Claim("says nothing"), _difference((SECOND,), (RUNS["long"],))),
        Finding("judge, M = 2 − M = 1", above(MORE), _difference((TWO,), (ONE,))),
        Finding("judge, M = 4 − M = 2", above(MORE), _difference((FOUR,), (TWO,))),
    ]
}
