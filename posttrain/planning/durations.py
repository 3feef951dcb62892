"""How long a command takes: from a rate of tokens that was given, or from steps that were tried here; else unknown.

    hours = tokens / throughput / 3600        throughput: tokens per second of all devices together, as the plan counts
                                              them: trained on, read, or drawn (at most: answers may end early)
    hours = steps * seconds per step / 3600   from a trial (trial.py)

Nothing is computed from the nominal speed of a processor: no training reaches it, and by how much it is missed depends
on the model, the lengths and the libraries. Torch-free, pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.schemas import (
    DistillCacheConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardScoreConfig,
    SftConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import ChoicesConfig, PerplexityConfig, QaConfig

__all__ = ["UNKNOWN", "Trial", "duration"]

UNKNOWN = "not known: gemma2 plan takes --throughput TOKENS/S, or tries three steps with --measure"
NO_ROWS = "not known: there are no rows to count tokens of"
TRAINED = (SftConfig, RewardConfig)
READ = (
    *(DistillCacheConfig, ProbeConfig, RewardScoreConfig, RewardEvalConfig),
    *(ChoicesConfig, PerplexityConfig, QaConfig),
)


@dataclass(frozen=True)
class Trial:
    """What the first steps of a run took here.

    seconds  per step, without the first one
    peak     bytes of main memory at the peak of the process, libraries included
    """

    steps: int
    seconds: float
    peak: float


def duration(
    config: Config, tokens: float, steps: int | None, throughput: float | None = None, trial: Trial | None = None
) -> JsonObject:
    """Return tokens and hours of a command as lines of a plan; {} for one that handles no tokens."""
    if not tokens:
        return {}
    verb = "trained" if isinstance(config, TRAINED) else "read" if isinstance(config, READ) else "drawn"
    known = not math.isnan(tokens)
    name = f"tokens_{verb}_{'at_most' if verb == 'drawn' else 'about'}"
    found: JsonObject = {name: round(tokens) if known else None}
    if trial is not None:
        found |= {"seconds_per_step": float(f"{trial.seconds:.3g}"), "steps_tried": trial.steps}
        found |= {"measured_peak_gib": round(trial.peak / 2**30, 3)}
        return found | ({"hours": float(f"{steps * trial.seconds / 3600:.3g}")} if steps else {})
    if throughput is None:
        return found | {"time": UNKNOWN}
    found["throughput"] = throughput
    return found | ({"hours": float(f"{tokens / throughput / 3600:.3g}")} if known else {"time": NO_ROWS})
