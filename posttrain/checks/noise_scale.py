"""The angle between task vectors of RL runs, from the number of completions. Pure.

    cos(angle) = 1 / (1 + N / C)     C = T B, completions of a run: steps times completions per step

N, the noise scale, is counted in completions: at C = N half of a task vector's square is noise, and two runs are 60
degrees apart. Derivation: Adam moves a weight by about the learning rate lr a step, of which a share s sqrt(B) is
signal that all runs have in common and c is noise of the run. After T steps the drift is lr T sqrt(B) s and the noise
lr sqrt(T) c, so that N = (c / s)^2 (docs/warp.md, "Why 56 degrees"; the idea of a noise scale: McCandlish et al.,
arXiv 1812.06162). N is a property of task, reward and model.

Deviations of real runs: momentum, clipping and a reward that saturates are left out; angles were up to 5 degrees below.
"""

from __future__ import annotations

import math

__all__ = ["completions_for", "expected_angle", "mean_norm", "noise_scale_of", "noise_share"]


def expected_angle(noise_scale: float, completions: float) -> float:
    """Degrees between the task vectors of two runs from one init, after `completions` each."""
    return math.degrees(math.acos(1 / (1 + noise_scale / completions)))


def noise_scale_of(angle: float, completions: float) -> float:
    """N in completions, from a measured angle in degrees; infinite from 90 degrees on, where no signal is seen."""
    cosine = math.cos(math.radians(angle))
    return completions * (1 / cosine - 1) if cosine > 1e-12 else math.inf  # cos(90 degrees) is 6e-17 in fp64


def completions_for(angle: float, noise_scale: float) -> float:
    """Completions of each run at which task vectors are `angle` degrees apart, over 0 and under 90."""
    cosine = math.cos(math.radians(angle))
    return noise_scale * cosine / (1 - cosine)


def noise_share(angle: float) -> float:
    """Share of a task vector's square that is the run's own noise: two runs have the rest, cos(angle), in common."""
    return 1 - math.cos(math.radians(angle))


def mean_norm(angle: float, models: int) -> float:
    """Norm of the plain average (LERP) of M task vectors of equal norm, over that norm: sqrt((1 + (M - 1) cos) / M)."""
    return math.sqrt((1 + (models - 1) * math.cos(math.radians(angle))) / models)
