"""Guards of the RL stage: what stops a run before it wastes time or does harm. Torch-free.

A guard raises GuardStop (exit code 3) before the optimizer step; the last checkpoint stays for `--resume`. The gradient
guard is in `training/trainer.py`, the one on rewards that are not finite in `rollout.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gemma2.core.errors import GuardStop
from gemma2.core.progress import Progress

__all__ = ["Guards"]

# One small batch may be cut at the limit by chance; three in a row say that the limit is too low.
TRUNCATED_STEPS = 3
ROUNDING = 1e-5  # of a reward, in its own size
MISMATCH = 0.05  # nats per token between vLLM and the policy; rounding to bf16 gives about a hundredth


@dataclass
class Guards:
    """Counts steps that look wrong, and stops the run after too many of them.

    tolerance: the largest KL per token, nats, that counts as 0 at the first step; None if it need not be 0 there.
    """

    progress: Progress
    max_kl: float | None
    max_dead_steps: int
    tolerance: float | None = None
    dead_steps: int = 0
    truncated_steps: int = 0
    warned: bool = False
    mismatched: bool = False

    def observe(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Judge the completions of a training step. `step` counts from 1."""
        if step == 1:
            self._check_start(metrics)
        # The same completion, read by a reward model in another batch, differs in the last bits.
        alike = (metrics["reward_std_in_group"] or 0.0) <= ROUNDING * max(1.0, abs(metrics["reward"] or 0.0))
        self.dead_steps = self.dead_steps + 1 if alike else 0
        truncated = metrics["truncated"] or 0.0
        self.truncated_steps = self.truncated_steps + 1 if truncated == 1 else 0
        if truncated > 0.5 and not self.warned:
            self.warned = True
            self.progress.warn(f"step {step}: {truncated:.0%} of the completions were cut; raise --max-new-tokens")
        mismatch = abs(metrics.get("vllm_mismatch") or 0.0)
        if mismatch >= MISMATCH and not self.mismatched:
            self.mismatched = True
            self.progress.warn(
                f"step {step}: vLLM's log-probs differ from the policy's by {mismatch:.2g} nats per token: the samples "
                "are those of another policy; see gemma2 doctor, or use --engine transformers"
            )
        if self.dead_steps >= self.max_dead_steps:
            raise GuardStop(
                f"step {step}: no difference in reward within any group for {self.dead_steps} steps",
                "raise --temperature, or check the reward; --max-dead-steps sets the limit",
            )
        if self.truncated_steps >= TRUNCATED_STEPS:
            raise GuardStop(
                f"step {step}: every completion was cut at the limit, {TRUNCATED_STEPS} steps running",
                "raise --max-new-tokens",
            )

    def measured(self, step: int, kl: float, truncated: float) -> None:
        """Judge an evaluation: KL to the SFT policy (nats per sequence) and the share of truncated completions."""
        if not math.isfinite(kl):
            raise GuardStop(f"step {step}: the KL to the SFT policy is {kl}", "lower --learning-rate")
        if self.max_kl is not None and kl >= self.max_kl:
            raise GuardStop(
                f"step {step}: the KL to the SFT policy is {kl:.4g} nats, the limit is {self.max_kl:g}",
                "raise --max-kl or --beta, or lower --learning-rate",
            )
        if truncated == 1:
            raise GuardStop(f"step {step}: every held-out completion was cut at the limit", "raise --max-new-tokens")

    def _check_start(self, metrics: Mapping[str, float | None]) -> None:
        """The anchor starts as the policy, so the first KL to it is 0: anything else is a bug in sampler or scorer."""
        kl = metrics["kl_anchor"]
        if self.tolerance is not None and kl is not None and abs(kl) > self.tolerance * (metrics["length"] or 1.0):
            raise RuntimeError(f"KL to the anchor is {kl:.3g} nats at the first step, not 0")

    def state(self) -> dict[str, int]:
        """The state that a checkpoint keeps."""
        return {"dead_steps": self.dead_steps, "truncated_steps": self.truncated_steps}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from `state`."""
        self.dead_steps, self.truncated_steps = state["dead_steps"], state["truncated_steps"]
