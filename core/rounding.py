"""When a change of a model is no more than rounding: of its weights, and of what it answers.

Weights: |theta - theta_start| / |theta_start| < 2^-14, over the tensors that changed. bf16, the dtype in which Gemma 2
is published and served, has steps of 2^-8 to 2^-7 of a value; 2^-14 is 1/64 of the smallest, so that about one weight
in a hundred would be stored as another number.

Answers: a KL to the start below 1e-3 nats per sequence, two standard errors included. Then no set of answers is more
than 2.3 percentage points more likely under one policy than under the other (Pinsker's inequality).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .json_files import JsonMapping

__all__ = ["SAME_AS_START", "STILL", "STILL_KL", "differ", "is_still", "relative_change", "still_points"]

STILL = 2.0**-14
STILL_KL = 1e-3  # nats per sequence
SAME_AS_START = "these policies do not differ from the start"

NOT_TRAINED = ("base", "sft", "trajectory")  # kinds of points; RL or a merge made the others


def is_still(relative: float | None) -> bool:
    """Whether a relative change of weights is rounding; None (nothing to compare with) is not."""
    return relative is not None and relative < STILL


def relative_change(tensors: Iterable[tuple[float, float]]) -> float | None:
    """Return |change| / |start| from their squared norms per tensor, over the tensors that changed.

    0 if none did; None if there is no tensor, or all that changed were 0 at the start.
    """
    pairs = list(tensors)
    changed = [(moved, before) for moved, before in pairs if moved > 0]
    size = sum(before for _, before in changed)
    if not pairs or (changed and not size):
        return None
    return float((sum(moved for moved, _ in changed) / size) ** 0.5) if changed else 0.0


def still_points(points: Sequence[JsonMapping]) -> list[JsonMapping]:
    """Return the policies and merges of a front whose KL to the start is rounding."""
    return [point for point in points if point.get("kind") not in NOT_TRAINED and _largest(point) < STILL_KL]


def differ(points: Sequence[JsonMapping]) -> bool:
    """Whether any policy or merge of a front differs from the start; a front without any has nothing to differ."""
    trained = [point for point in points if point.get("kind") not in NOT_TRAINED]
    return not trained or len(still_points(trained)) < len(trained)


def _largest(point: JsonMapping) -> float:
    return abs(float(point["kl"])) + 2 * float(point.get("kl_se") or 0.0)
