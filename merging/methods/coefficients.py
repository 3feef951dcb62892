"""Merge coefficients from inner products: linear, EMA, SLERP of task vectors, LITI, WARP, task arithmetic, Model Stock.

Every merge here is one linear combination per group, so a Gram matrix of the group's vectors is all that is ever
needed. Pure functions on small fp64 arrays; nothing here sees a path or a tensor.

Sources: WARP, arXiv 2406.16768v1, sections 3.2 and 3.3, appendix B.3; task arithmetic, 2212.04089; Model Stock,
2403.19522. Deviations: WARP defines SLERP for vectors with an angle strictly between 0 and 180 degrees; a zero vector
or an angle near 0 falls back to linear interpolation (its limit), an angle near 180 is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import InputError

__all__ = [
    "Slerp",
    "angle_degrees",
    "ema_coefficients",
    "linear_coefficients",
    "liti_coefficients",
    "model_stock",
    "norm",
    "slerp",
    "slerp_coefficients",
    "task_arithmetic",
    "warp_coefficients",
]

Doubles = NDArray[np.float64]

# Radians. Below it SLERP and LERP differ by less than 1e-6 of the vectors; sin(angle) would amplify the cosine's error.
SMALLEST_ANGLE = 1e-3


@dataclass(frozen=True)
class Slerp:
    """Coefficients of the vectors, shape (M,), and why a step fell back to linear interpolation ("" when none did)."""

    coefficients: Doubles
    fallback: str = ""


def norm(gram: Doubles, u: Doubles) -> float:
    """Length of `sum_i u_i v_i`, where `gram[i, j] = <v_i, v_j>` (M, M) and u is (M,)."""
    return float(np.sqrt(max(float(u @ gram @ u), 0.0)))


def angle(gram: Doubles, u: Doubles, w: Doubles) -> float:
    """Radians between `sum u_i v_i` and `sum w_i v_i`; the cosine is clamped. Neither may be zero."""
    cosine = float(u @ gram @ w) / (norm(gram, u) * norm(gram, w))
    return float(np.arccos(np.clip(cosine, -1.0, 1.0)))


def angle_degrees(gram: Doubles, i: int, j: int) -> float | None:
    """Degrees between vectors i and j; None when one of them is zero."""
    if gram[i, i] <= 0 or gram[j, j] <= 0:
        return None
    axes = np.eye(len(gram))
    return float(np.degrees(angle(gram, axes[i], axes[j])))


def slerp(gram: Doubles, t: float | None = None, group: str = "the group") -> Slerp:
    """Spherical interpolation of M >= 2 vectors with Gram matrix (M, M), not normalised.

    Two vectors: `sin((1-t)O)/sin(O) v_1 + sin(tO)/sin(O) v_2`, t = 1/2 by default (WARP section 3.2).
    More: one after the other, with lambda = 1/k at the k-th (appendix B.3, eq. 26); the order is the caller's.
    Raises InputError, naming `group`, when two vectors to be merged point in opposite directions.
    """
    size = len(gram)
    axes = np.eye(size)
    merged, fallback = axes[0], ""
    for k in range(2, size + 1):
        share = 1.0 / k if t is None else t
        step = _slerp_step(gram, merged, axes[k - 1], share, f"{group}: task vector {k}")
        merged = step.coefficients
        fallback = fallback or step.fallback
    return Slerp(merged, fallback)


def _slerp_step(gram: Doubles, u: Doubles, w: Doubles, share: float, what: str) -> Slerp:
    linear = (1.0 - share) * u + share * w
    if norm(gram, u) == 0.0 or norm(gram, w) == 0.0:
        return Slerp(linear, "zero task vector")
    omega = angle(gram, u, w)
    if omega < SMALLEST_ANGLE:
        return Slerp(linear, "angle near 0")
    if omega > np.pi - SMALLEST_ANGLE:
        raise InputError(
            f"{what} points opposite to what it is merged with ({np.degrees(omega):.2f} degrees)",
            "SLERP is not defined there; use gemma2 merge linear, or check the models",
        )
    left, right = np.sin((1.0 - share) * omega), np.sin(share * omega)
    return Slerp((left * u + right * w) / np.sin(omega))


def slerp_coefficients(gram: Doubles, t: float | None = None) -> Doubles:
    """Coefficients (M,) of the task vectors; see `slerp`. At 90 degrees: M=2 .7071 .7071, M=3 .6124 .6124 .5."""
    return slerp(np.asarray(gram, dtype=np.float64), t).coefficients


def liti_coefficients(eta: float) -> Doubles:
    """(init, merged): `(1 - eta) * init + eta * merged`, linear interpolation towards the init (WARP section 3.3)."""
    return np.array([1.0 - eta, eta])


def warp_coefficients(slerped: Doubles, eta: float) -> Doubles:
    """(init, policy_1, ..., policy_M): SLERP of task vectors (M,), then LITI, as one combination.

    `(1 - eta) init + eta (init + sum c_m (policy_m - init))`; eta = 1 is SLERP alone.
    """
    return np.concatenate([[1.0 - eta * slerped.sum()], eta * slerped])


def linear_coefficients(models: int, weights: Sequence[float] | None = None) -> Doubles:
    """The given weights, or the uniform average (WARM section 3.1: phi = mean(phi_m))."""
    return np.full(models, 1.0 / models) if weights is None else np.array(weights, dtype=np.float64)


def ema_coefficients(models: int, decay: float | None = None) -> Doubles:
    """Checkpoints in order, the recursion `e_1 = c_1; e_k = decay e_(k-1) + (1 - decay) c_k` written out.

    None is the uniform average of the checkpoints.
    """
    if decay is None:
        return linear_coefficients(models)
    ages = np.arange(models - 1, -1, -1, dtype=np.float64)
    coefficients = (1.0 - decay) * decay**ages
    coefficients[0] = decay ** (models - 1)
    return coefficients


def task_arithmetic(weights: Sequence[float], scale: float = 1.0, normalize: bool = False) -> Doubles:
    """Of the task vectors (M,): `scale * w_m`, with `normalize` `scale * w_m / sum w` (arXiv 2212.04089)."""
    given = np.array(weights, dtype=np.float64)
    return scale * given / given.sum() if normalize else scale * given


def model_stock(gram: Doubles) -> Doubles:
    """Of M >= 2 task vectors with Gram matrix (M, M): t / M each, `t = M cos / (1 + (M - 1) cos)` (arXiv 2403.19522).

    cos is the mean over the pairs of the cosine of their angle; a pair with a zero vector counts as orthogonal. The
    paper has angles under 90 degrees; for a mean of 90 or more t is 0: the result is the base. So it is for one vector,
    of a slice that has the base alone.
    """
    models = len(gram)
    if models < 2:
        return np.zeros(models)
    lengths = np.sqrt(np.diag(gram))
    products = np.outer(lengths, lengths)
    cosines = np.divide(gram, products, out=np.zeros_like(products), where=products > 0)
    cosine = min(max(float(cosines[np.triu_indices(models, 1)].mean()), 0.0), 1.0)
    return np.full(models, cosine / (1.0 + (models - 1) * cosine))
