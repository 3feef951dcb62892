"""Means on the sphere, as coefficients from the Gram matrix: NuSLERP, multi-SLERP and the Karcher mean.

Directions u_m = v_m / |v_m|; the result is a point of the unit sphere times the weighted mean of the lengths. In the
tangent space at a unit vector x:

    log_x(u) = a / sin(a) (u - cos(a) x), a = angle(x, u)         exp_x(T) = cos|T| x + sin|T| / |T| T

Karcher mean: x <- exp_x(sum_m w_m log_x(u_m)) until the step is short (H. Karcher, "Riemannian center of mass and
mollifier smoothing", 1977). Multi-SLERP: one such step from the weighted mean of the directions; from two orthogonal
vectors of one length and equal weights it is SLERP. Iterations run on the M x M matrix of cosines.

Not defined, and an error: directions that cancel, or one that points opposite to the mean. A zero vector has no
direction: the group falls back to linear interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma2.core.errors import InputError, UsageError

from .coefficients import SMALLEST_ANGLE, Doubles, Slerp, angle, norm, slerp

__all__ = ["karcher", "multislerp", "nuslerp", "shares"]


def nuslerp(gram: Doubles, weights: Sequence[float] | None = None, group: str = "the group") -> Slerp:
    """SLERP of two vectors with Gram matrix (2, 2) at t = w_2 / (w_1 + w_2), 1/2 without weights; see `slerp`."""
    return slerp(gram, float(shares(len(gram), weights)[1]), group)


def multislerp(gram: Doubles, weights: Sequence[float] | None = None, group: str = "the group") -> Slerp:
    """One step in the tangent space at the weighted mean of the directions; (M, M) to (M,), weights uniform if None.

    Raises InputError, naming `group`, where the mean or a direction's place in the tangent space is not defined.
    """
    return _mean(gram, shares(len(gram), weights), group, steps=1, tolerance=0.0)


def karcher(
    gram: Doubles,
    weights: Sequence[float] | None = None,
    group: str = "the group",
    *,
    max_iterations: int = 10,
    tolerance: float = 1e-5,
) -> Slerp:
    """Weighted Karcher mean of the directions; (M, M) to (M,), weights uniform if None.

    Ends with the first step shorter than `tolerance` radians, or after `max_iterations`. Raises InputError, naming
    `group`, where it is not defined.
    """
    return _mean(gram, shares(len(gram), weights), group, steps=max_iterations, tolerance=tolerance)


def shares(models: int, weights: Sequence[float] | None) -> Doubles:
    """Weights (M,) that sum to 1."""
    given = np.ones(models) if weights is None else np.array(weights, dtype=np.float64)
    if given.min() < 0 or not given.sum() > 0:
        raise UsageError(f"weights {given.tolist()} are not shares of a mean", "give positive weights")
    result: Doubles = given / given.sum()
    return result


def _mean(gram: Doubles, shares: Doubles, group: str, *, steps: int, tolerance: float) -> Slerp:
    lengths = np.sqrt(np.diag(gram))
    if lengths.min() <= 0:
        return Slerp(shares, "zero task vector")
    cosines = np.clip(gram / np.outer(lengths, lengths), -1.0, 1.0)
    place = shares
    if norm(cosines, place) < SMALLEST_ANGLE:
        raise InputError(
            f"{group}: the directions of the models cancel", "use gemma2 merge linear, or check the models"
        )
    place = place / norm(cosines, place)
    for _ in range(steps):
        step = shares @ np.array([_log(cosines, place, m, group) for m in range(len(shares))])
        length = norm(cosines, step)
        place = np.cos(length) * place + np.sinc(length / np.pi) * step
        place = place / norm(cosines, place)
        if length < tolerance:
            break
    return Slerp(float(shares @ lengths) * place / lengths)


def _log(cosines: Doubles, place: Doubles, model: int, group: str) -> Doubles:
    """log_x(u) of one model's direction at x = `place`, in coordinates of the directions (M,)."""
    direction = np.eye(len(place))[model]
    away = angle(cosines, place, direction)
    if away > np.pi - SMALLEST_ANGLE:
        raise InputError(
            f"{group}: model {model + 1} points opposite to the mean of the models ({np.degrees(away):.2f} degrees)",
            "use gemma2 merge linear, or check the models",
        )
    result: Doubles = (direction - np.cos(away) * place) / np.sinc(away / np.pi)
    return result
