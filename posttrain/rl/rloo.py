"""The trainer of the RL stage: TRL's RLOOTrainer with another rollout and another loss; the rest stays TRL's.

    theta <- Opt(theta, mean_i A_i grad log pi(y_i | x_i)),   log pi(y | x) = sum over completion tokens
                                                                        (WARP 2406.16768, Algorithm 1, line 7)

Deviations from TRL 1.16, each on one of its private hooks (tests/posttrain/rl/test_trl_contract.py guards them):
1. `_generate_and_score_completions` is our rollout: shared prefill, kept log-probs, token-level rewards, our anchor.
2. `_compute_loss` is plain REINFORCE. On-policy, TRL's clipped ratio to the sampling policy is 1, with this gradient;
   in bf16 its noise would clip. The LM head sees completion positions only (on a CPU, TRL's sees the prompt as well).
3. TRL gets beta = 0, so that it builds no reference model: the KL is in the reward, to the anchor that we keep.
4. A checkpoint also holds the anchor, the sampler's generator and the guards' counters, and no model card. Every step
   generates its own completions, so every step is an edge of TRL's generation buffer and a safe place for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl import RLOOConfig, RLOOTrainer

from gemma2.merging.errors import InputError

from .ema import EmaAnchor
from .guards import Guards
from .objective import policy_loss
from .rollout import Rollout

__all__ = ["AnchoredRlooTrainer", "prompt_order"]

ANCHOR_FILE = "anchor.safetensors"
STATE_FILE = "rollout.pt"


def prompt_order(prompts: int, draws: int, seed: int) -> list[int]:
    """Which prompt each group answers, `draws` of them: fresh permutations of all prompts, one after another.

    Written out for the whole run, so that a resumed run meets the same prompts: TRL's sampler would start its shuffling
    again from the first epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < draws:
        order += torch.randperm(prompts, generator=generator).tolist()
    return order[:draws]


class AnchoredRlooTrainer(RLOOTrainer):
    """RLOO on our rollouts, in one process. `anchor` is what checkpoints must hold; a fixed anchor is None here."""

    def __init__(
        self,
        rollout: Rollout,
        anchor: EmaAnchor | None,
        args: RLOOConfig,
        guards: Guards,
    ) -> None:
        draws = args.max_steps * args.generation_batch_size // args.num_generations
        super().__init__(
            model=rollout.policy,
            reward_funcs=[],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": prompt_order(len(rollout.prompts), draws, args.seed)}),
            processing_class=rollout.chat.tokenizer,
        )
        self.rollout = rollout
        self.anchor = anchor
        self.guards = guards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        indices = [row["prompt"] for row in inputs[:: self.num_generations]]  # TRL repeats each prompt n times
        with self.accelerator.autocast():
            batch, metrics = self.rollout(indices)
        self.guards.observe(self.state.global_step + 1, metrics)
        for name, value in metrics.items():
            if value is not None:
                self._metrics["train"][name].append(value)
        device = self.accelerator.device
        return {
            "ids": batch.ids.to(device),
            "mask": batch.mask.to(device),
            "advantages": batch.advantages.to(device),
        }

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        width = int(inputs["mask"].nonzero()[:, 1].max()) + 1  # a micro-batch may be narrower than its batch
        ids, mask = inputs["ids"][:, :width], inputs["mask"][:, :width]
        with self.accelerator.autocast():
            loss, entropy, tokens = policy_loss(model, ids, mask, inputs["advantages"], self.temperature)
        self._metrics["train"]["entropy"].append(entropy.item() / tokens)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.anchor is not None:
            self.anchor.save(folder / ANCHOR_FILE)
        state = {"generator": self.rollout.generator.get_state(), "guards": self.guards.state()}
        torch.save(state, folder / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        if self.anchor is not None:
            self.anchor.load(folder / ANCHOR_FILE)
        if not (folder / STATE_FILE).is_file():
            raise InputError(f"the checkpoint {folder} holds no sampler state", "start over with --force")
        state = torch.load(folder / STATE_FILE, weights_only=True)
        self.rollout.generator.set_state(state["generator"])
        self.guards.restore(state["guards"])
