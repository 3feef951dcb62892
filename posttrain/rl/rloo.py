"""The trainer of the RL stage: TRL's RLOOTrainer with another rollout and another loss; the rest stays TRL's.

    theta <- Opt(theta, mean_i A_i grad log pi(y_i | x_i)),   log pi(y | x) = sum over completion tokens
                                                                        (WARP 2406.16768, Algorithm 1, line 7)

Deviations from TRL 1.16, each on one of its private hooks (tests/posttrain/rl/test_trl_contract.py guards them):
1. `_generate_and_score_completions` is our rollout: shared prefill, kept log-probs, token-level rewards, our anchor.
2. `_compute_loss` is plain REINFORCE. On-policy, TRL's clipped ratio to the sampling policy is 1, with this gradient;
   in bf16 its noise would clip. The LM head sees completion positions only (on a CPU, TRL's sees the prompt as well).
   In one process on a CPU rows of similar length get a separate forward and backward pass.
3. TRL gets beta = 0, so that it builds no reference model: the KL is in the reward, to the anchor that we keep.
4. The loss runs inside the forward of DistributedDataParallel, as TRL's own fused losses do.
5. A checkpoint also holds the anchor, the sampler's generator and the guards' counters, and no model card. Every step
   generates its own completions, so every step is an edge of TRL's generation buffer and a safe place for it.
6. A policy that is divided over processes comes with its adapters and without peft's wrapper: TRL would add a second
   adapter to that. Checkpoints are those of `training/sharded_trainer.py`, the anchor in the same collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import RLOOConfig, RLOOTrainer
from trl.models.utils import _ForwardRedirection

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.training.first_steps import STEPS
from gemma2.posttrain.training.sharded_trainer import ShardedTrainer

from .ema import EmaAnchor
from .first_rollouts import check_loss
from .guards import Guards
from .objective import loss_parts, policy_loss
from .rollout import Rollout

__all__ = ["AnchorUpdate", "AnchoredRlooTrainer", "prompt_order"]

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


class AnchorUpdate(TrainerCallback):  # type: ignore[misc]  # the library is not typed
    """ema <- (1 - mu) ema + mu theta, after every optimizer step, or every so many (WARP, Algorithm 1, line 8)."""

    def __init__(self, anchor: EmaAnchor, policy: CausalLM, mu: float, every: int = 1) -> None:
        self.anchor = anchor
        self.policy = policy
        self.mu = mu
        self.every = every

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if (state.global_step + 1) % self.every == 0:  # the step that ends is not counted yet
            self.anchor.update(self.policy, self.mu)


class AnchoredRlooTrainer(ShardedTrainer, RLOOTrainer):  # type: ignore[misc]  # the library is not typed
    """RLOO on our rollouts. `anchor` is what checkpoints must hold; a fixed anchor is None here.

    With `peft_config` the layers of the rollout's policy get adapters, in place, and those are trained. `divided`: the
    policy in shards that lends its weights to that of the rollout, and is trained.
    """

    def __init__(
        self,
        rollout: Rollout,
        anchor: EmaAnchor | None,
        args: RLOOConfig,
        guards: Guards,
        peft_config: object | None = None,
        divided: CausalLM | None = None,
    ) -> None:
        self.trained = rollout.policy if divided is None else divided  # read by callbacks that TRL's __init__ adds
        draws = args.max_steps * args.generation_batch_size // args.num_generations
        with warnings.catch_warnings():
            # peft 0.21 asks the model for `is_gradient_checkpointing`, which transformers 5 renamed.
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(
                model=self.trained,
                reward_funcs=[],
                args=args,
                train_dataset=Dataset.from_dict({"prompt": prompt_order(len(rollout.prompts), draws, args.seed)}),
                processing_class=rollout.chat.tokenizer,
                peft_config=peft_config,
            )
        self.rollout = rollout
        self.anchor = anchor
        self.guards = guards
        self.redirect = _ForwardRedirection()
        self.rollouts, self.checks_loss = 0, False
        self.has_signal = True  # whether the samples of the step differ in what they are worth
        self._entropy = torch.zeros(2)  # sum, nats, and number of tokens since the last line of metrics

    def follow(self, anchor: EmaAnchor, mu: float, every: int = 1) -> None:
        """Keep this anchor, and move it by `mu` after every `every` optimizer steps."""
        self.anchor = anchor
        self.rollout.anchor = anchor.model
        self.add_callback(AnchorUpdate(anchor, self.trained, mu, every))

    def further_state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The average on the shards, for the checkpoint of a sharded run."""
        return {} if self.anchor is None else {"anchor": self.anchor.state_dict()}

    def _generate_and_score_completions(self, inputs: list[JsonObject]) -> dict[str, Tensor]:
        indices = [row["prompt"] for row in inputs[:: self.num_generations]]  # TRL repeats each prompt n times
        with self.accelerator.autocast():
            batch, metrics = self.rollout(indices)
        self.guards.observe(self.state.global_step + 1, metrics)
        self.has_signal = any(self.rollout.ranks.gather(bool(batch.advantages.any())))
        self.checks_loss, self.rollouts = self.rollouts < STEPS, self.rollouts + 1
        for name, value in metrics.items():
            if value is not None:
                self._metrics["train"][name].append(value)
        device = self.accelerator.device
        return {
            "ids": batch.ids.to(device),
            "mask": batch.mask.to(device),
            "advantages": batch.advantages.to(device),
            "sampled": batch.sampled.to(device),
        }

    def _compute_loss(self, model: CausalLM, inputs: dict[str, Tensor]) -> Tensor:
        # Through the forward of the wrapper: DistributedDataParallel reduces only the gradients of that, and FSDP2
        # gathers weights before the forward of its root.
        if self.sharded:
            result: Tensor = self.redirect(self.trained, self.trained, self._loss, inputs)
        else:
            result = self.redirect(model, self.accelerator.unwrap_model(model), self._loss, inputs)
        if self.checks_loss:
            with self.accelerator.autocast():  # its rounding
                check_loss(self.trained, result.detach(), inputs["advantages"], inputs["sampled"], inputs["mask"])
        return result

    def _loss(self, inputs: dict[str, Tensor]) -> Tensor:
        # Of several processes each runs one forward and one backward pass: gradients are reduced in the backward pass.
        whole = self.accelerator.num_processes > 1 or self.sharded
        passes: list[tuple[Tensor, Tensor, int]] = []
        for part in loss_parts(inputs["ids"], inputs["mask"], inputs["advantages"], whole):
            if passes:  # free the graph of a part before the next one is built
                self.accelerator.backward(passes[-1][0] / self.current_gradient_accumulation_steps)
            with self.accelerator.autocast():
                passes.append(policy_loss(self.trained, *part, self.temperature))
        losses, entropies, counts = zip(*passes, strict=True)
        loss = losses[-1] + sum(value.detach() for value in losses[:-1])
        entropy, tokens = sum(entropies, torch.zeros_like(loss)), sum(counts)
        everyone = self.accelerator.gather(torch.stack([entropy.detach().float(), entropy.new_tensor(tokens).float()]))
        self._entropy += everyone.view(-1, 2).sum(0).cpu()
        result: Tensor = loss
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Entropy is a mean over the tokens since the last line, however they were cut into forward passes."""
        total, count = self._entropy.tolist()
        if count:
            self._metrics["train"]["entropy"] = [total / count]
            self._entropy.zero_()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.anchor is not None and not self.sharded:
            self.anchor.save(folder / ANCHOR_FILE)
        state = {"generator": self.rollout.generator.get_state(), "guards": self.guards.state()}
        torch.save(state, folder / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        if self.anchor is not None and not self.sharded:  # else with weights and moments
            self.anchor.load(folder / ANCHOR_FILE)
        if not (folder / STATE_FILE).is_file():
            raise InputError(f"the checkpoint {folder} holds no sampler state", "start over with --force")
        state = torch.load(folder / STATE_FILE, weights_only=True)
        self.rollout.generator.set_state(state["generator"])
        self.guards.restore(state["guards"])
