"""How near a run of RL is to the limits at which its guards stop it (`rl/guards.py`). Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gemma2.core.json_files import JsonMapping
from gemma2.posttrain.rl.guards import ROUNDING

__all__ = ["GuardMargin", "is_without_variance", "margins_of"]

NEAR = 0.8  # of a limit
TRUNCATED = 0.5  # the share at which a run warns


@dataclass(frozen=True)
class GuardMargin:
    """A figure that a guard watches. limit: where the guard stops the run, or warns."""

    name: str
    value: float
    limit: float

    @property
    def near(self) -> bool:
        """Whether the figure is near its limit, or beyond it."""
        return not self.value < NEAR * self.limit  # NaN is near


def is_without_variance(row: JsonMapping) -> bool:
    """Whether the completions of a step got the same reward within each group, as far as rounding lets us see."""
    spread, reward = row.get("reward_std_in_group"), row.get("reward")
    if not isinstance(spread, int | float):
        return False
    size = abs(reward) if isinstance(reward, int | float) and math.isfinite(reward) else 0.0
    return spread <= ROUNDING * max(1.0, size)


def margins_of(config: JsonMapping, figures: Mapping[str, float], dead_steps: int) -> list[GuardMargin]:
    """Return what the guards of a run compare, from its settings and its newest figures; empty without guards.

    dead_steps: the last steps in a row without variance of the reward
    """
    found = []
    limit, dead = config.get("max_kl"), config.get("max_dead_steps")
    if isinstance(limit, int | float) and limit > 0 and "kl" in figures:
        found.append(GuardMargin("KL to the SFT policy", figures["kl"], float(limit)))
    if isinstance(dead, int) and "reward" in figures:  # RL
        if "truncated" in figures:
            found.append(GuardMargin("share of truncated completions", figures["truncated"], TRUNCATED))
        if dead_steps:
            found.append(GuardMargin("steps without variance of the reward", float(dead_steps), float(dead)))
    return found
