"""The report of a merge per group: norms, angles, coefficients, and warnings. Pure, from Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from gemma2.core.json_files import JsonObject
from gemma2.core.rounding import is_still, relative_change
from gemma2.merging.methods.coefficients import angle_degrees, norm
from gemma2.merging.methods.method import Mix
from gemma2.merging.plan.merge_plan import NO_BASE, NO_BASE_FIX

__all__ = ["GroupReport", "gram_of", "judge", "mean_angle", "report_group"]

Doubles = NDArray[np.float64]

NARROW, WIDE = 30.0, 150.0  # degrees; task vectors of independent RL runs are 60 to 90 apart
FAR = 0.5  # share of the weights' norm above which a task vector suggests that the base is not the ancestor


@dataclass(frozen=True)
class GroupReport:
    """One group of a merge. Vectors are task vectors if there is a base, else the weights.

    parameters    elements in the group
    base_norm     length of the base; None without one
    norms         length of each model's vector
    angles        degrees between each pair of them, in the order 1-2, 1-3, ..., 2-3, ...; None if one is zero
    result_norms  length of the merged vector, per output
    coefficients  weights of the operands (the base, if there is one, then the models), per output
    fallback      reason why SLERP fell back to linear interpolation; "" if it did not
    """

    group: str
    parameters: int
    base_norm: float | None
    norms: tuple[float, ...]
    angles: tuple[float | None, ...]
    result_norms: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    fallback: str = ""

    @property
    def angle(self) -> float | None:
        """Mean of the angles that exist; None if none does."""
        angles = [angle for angle in self.angles if angle is not None]
        return sum(angles) / len(angles) if angles else None

    def as_dict(self) -> JsonObject:
        """Return the report for JSON."""
        return {**asdict(self), "angle": self.angle}


def report_group(name: str, parameters: int, base_square: float | None, gram: Doubles, mix: Mix) -> GroupReport:
    """Return the report of a group.

    base_square  squared norm of the base; None without one
    gram         (M, M) of the models' vectors
    mix          weights of the operands
    """
    models = len(gram)
    vectors = mix.weights[:, -models:]  # with a base: sum w_m (theta_m - base), since the weights sum to 1
    return GroupReport(
        group=name,
        parameters=parameters,
        base_norm=None if base_square is None else float(np.sqrt(base_square)),
        norms=tuple(float(value) for value in np.sqrt(np.diag(gram))),
        angles=tuple(angle_degrees(gram, i, j) for i, j in combinations(range(models), 2)),
        result_norms=tuple(norm(gram, row) for row in vectors),
        coefficients=tuple(tuple(float(value) for value in row) for row in mix.weights),
        fallback=mix.fallback,
    )


def gram_of(upper: Sequence[float], vectors: int) -> Doubles:
    """Return the symmetric matrix (M, M) of an upper triangle, given row by row."""
    matrix = np.zeros((vectors, vectors))
    if len(upper):
        matrix[np.triu_indices(vectors)] = upper
    return matrix + np.triu(matrix, 1).T


def mean_angle(groups: Sequence[GroupReport]) -> float | None:
    """Return the mean over the groups, weighted by parameters; None if no group has an angle."""
    pairs = [(group.angle, group.parameters) for group in groups if group.angle is not None]
    total = sum(weight for _, weight in pairs)
    return sum(angle * weight for angle, weight in pairs) / total if total else None


def judge(method: str, groups: Sequence[GroupReport]) -> list[str]:
    """Return warnings with figures, one line each. The manifest records them."""
    based = any(group.base_norm is not None for group in groups)
    spherical = method in ("slerp", "warp")
    warnings = []
    if spherical and not based:
        angle = mean_angle(groups)
        warnings.append(
            f"{NO_BASE}, which are {'zero' if angle is None else f'{angle:.3g} degrees apart'}; {NO_BASE_FIX}"
        )
    if based and len({len(group.norms) for group in groups}) == 1:  # not with stacked layers of different models
        warnings += _far_models(groups)
        warnings += _still_models(groups, spherical)
    if based and spherical:
        warnings += _odd_angles(groups)
    if spherical:
        for reason in sorted({group.fallback for group in groups} - {""}):
            names = [group.group for group in groups if group.fallback == reason]
            warnings.append(f"{reason}: SLERP fell back to LERP in {_some(names)}")
    return warnings


def _far_models(groups: Sequence[GroupReport]) -> list[str]:
    base = sum((group.base_norm or 0.0) ** 2 for group in groups) ** 0.5
    warnings = []
    for model in range(len(groups[0].norms)):
        delta = sum(group.norms[model] ** 2 for group in groups) ** 0.5
        if delta > FAR * base:
            warnings.append(
                f"model {model + 1} is far from the base: its task vector has norm {delta:.4g}, the base {base:.4g}; "
                "is the base its ancestor?"
            )
    return warnings


def _still_models(groups: Sequence[GroupReport], spherical: bool) -> list[str]:
    """Warnings for models that are the base but for rounding. SLERP has its own words for a zero task vector."""
    found = []
    for model in range(len(groups[0].norms)):
        size = relative_change((group.norms[model] ** 2, (group.base_norm or 0.0) ** 2) for group in groups)
        if is_still(size) and not (spherical and size == 0):
            found.append(
                f"model {model + 1} does not differ from the base: its task vector is {size:.1g} of the base's norm, "
                "rounding; train it further"
            )
    return found


def _odd_angles(groups: Sequence[GroupReport]) -> list[str]:
    tests: tuple[tuple[str, Callable[[float], bool], Callable[..., float]], ...] = (
        (f"under {NARROW:.0f}", lambda angle: angle < NARROW, min),
        (f"over {WIDE:.0f}", lambda angle: angle > WIDE, max),
    )
    warnings = []
    for words, odd, extreme in tests:
        found = {group.group: [a for a in group.angles if a is not None and odd(a)] for group in groups}
        found = {name: angles for name, angles in found.items() if angles}
        if found:
            worst = extreme(angle for angles in found.values() for angle in angles)
            warnings.append(f"task vectors are {words} degrees apart in {_some(list(found))} ({worst:.1f})")
    return warnings


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more groups"
