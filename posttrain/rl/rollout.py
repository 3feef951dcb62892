"""One on-policy batch of RL: draw completions, score them, subtract the KL to the anchor, and form advantages.

    y ~ pi(. | x)
    r_beta = r(x, y) - beta (log pi(y | x) - log anchor(y | x))            (WARP 2406.16768, Algorithm 1, lines 5-6)
    A_i = r_beta_i - mean of r_beta over the other samples of the same prompt

Log-ratios are sums over the tokens of the completion, both sides at the sampling temperature. No gradient flows through
r_beta; no other KL term exists. WARP does not state the baseline of its REINFORCE: the leave-one-out mean
(RLOO, 2402.14740) is ours. log pi comes from the sampler: on-policy and without top-p or top-k a second forward would
only repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma2.core.errors import GuardStop, InputError
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import Completions, SamplingParams, random_numbers, sample
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.rewards.functions import Sampled, Score
from gemma2.posttrain.schemas import RlFields
from gemma2.posttrain.sharding.lending import opened
from gemma2.posttrain.training.first_steps import STEPS
from gemma2.posttrain.training.one_row import check_bos

from .first_rollouts import Seen, alone, check_batch, check_log_probs, check_reward, row_to_score
from .step_metrics import ScoredCompletions, batch_metrics, joined
from .vllm import VllmSampler

__all__ = ["Batch", "Rollout", "anchored_rewards", "leave_one_out", "padded"]


def anchored_rewards(rewards: Tensor, log_ratios: Tensor, beta: float) -> Tensor:
    """r_beta (N,) from rewards (N,) and sequence sums of log pi - log anchor (N,), nats. Carries no gradient."""
    return (rewards - beta * log_ratios).detach()


def leave_one_out(rewards: Tensor, n: int) -> Tensor:
    """Advantages (P * n,): each reward less the mean of the other n - 1 of its group (RLOO, 2402.14740, section 3)."""
    groups = rewards.view(-1, n)
    others = (groups.sum(1, keepdim=True) - groups) / (n - 1)
    return (groups - others).flatten()


@dataclass(frozen=True)
class Batch:
    """The tensors of the loss. ids: (N, T) right-padded; mask: (N, T) True on completions; advantages: (N,) fp32.

    sampled: (N,) fp32 nats, the summed log-probs of each completion as the sampler gave them.
    """

    ids: Tensor
    mask: Tensor
    advantages: Tensor
    sampled: Tensor


@dataclass
class Rollout:
    """Draws and scores the batches of a run. Its only state is `generator`.

    Of several processes each answers its share of the prompts, with the random numbers that one process would use for
    them, and logs the figures of all.
    """

    policy: CausalLM
    anchor: CausalLM | None  # a model that scores and never generates; None: no KL in the reward
    chat: ChatFormat
    score: Score
    config: RlFields
    prompts: Sequence[Prompt]
    generator: torch.Generator
    batch_size: int  # sequences per forward pass
    ranks: Ranks = ALONE
    vllm: VllmSampler | None = None  # draws in the place of our sampler
    encoded: dict[int, list[int]] = field(default_factory=dict)  # ids of the prompts met so far
    unchecked: int = STEPS  # batches that are still computed a second way (first_rollouts.py)

    def __call__(self, indices: Sequence[int]) -> tuple[Batch, dict[str, float | None]]:
        """A batch of n completions for each of `prompts[indices]`, and the metrics of all ranks' batches.

        Raises GuardStop for a reward that is not finite, on every rank.
        """
        rows = [self.prompts[i] for i in indices]
        for i in indices:
            if i not in self.encoded:
                self.encoded[i] = self.encode(self.prompts[i])
        prompts = [self.encoded[i] for i in indices]
        drawn = self.draw(prompts)
        pairs = [prompts[i] for i in drawn.prompt_index]
        columns = dict(self.scores(rows, pairs, drawn))
        rewards = torch.tensor(columns.pop("reward"), dtype=torch.float32)
        log_ratios = self.log_ratios(pairs, drawn)
        objective = anchored_rewards(rewards, log_ratios, self.config.beta)
        batch = padded(pairs, drawn.ids, leave_one_out(objective, self.config.n), drawn.logps)
        if self.unchecked:
            self.unchecked -= 1
            self.check(Seen(rows, pairs, drawn, rewards, log_ratios, batch.ids, batch.mask, batch.advantages))
        own = ScoredCompletions(drawn.ids, drawn.truncated, rewards, log_ratios, columns)
        scored = joined(self.ranks.gather(own))
        if not scored.rewards.isfinite().all():
            raise GuardStop("the reward is NaN or infinite, nothing was updated", "check the reward model")
        metrics = batch_metrics(scored, self.anchor is not None, self.config.n)
        if self.vllm is not None:
            metrics["vllm_mismatch"] = self.vllm.mismatch
        return batch, metrics

    def check(self, seen: Seen) -> None:
        """Raise GuardStop if a batch is not what a second computation gives."""
        check_log_probs(self.policy, self.anchor, seen, self.config.temperature)
        check_batch(seen, self.config.beta, self.config.n)
        if not self.config.reward_fn and self.unchecked == STEPS - 1:  # once: a row costs a hundredth of a step
            i = row_to_score(seen)
            row, prompt, drawn = alone(seen, i)
            check_reward(float(seen.rewards[i]), self.scores(row, prompt, drawn)["reward"][0], row[0].where)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids. Raises InputError, with file and line, where prompt and completion would leave the context."""
        ids = self.chat.prompt_ids(prompt.messages)
        check_bos(self.chat, ids)
        context = getattr(self.policy.config, "max_position_embeddings", None)
        if context is not None and len(ids) + self.config.max_new_tokens > context:
            raise InputError(
                f"{prompt.where}: a prompt of {len(ids)} tokens and --max-new-tokens {self.config.max_new_tokens} "
                f"exceed the policy's context of {context}",
                "shorten or remove it, or lower --max-new-tokens",
            )
        return ids

    def draw(self, prompts: Sequence[Sequence[int]]) -> Completions:
        """n completions per prompt from the policy."""
        if self.vllm is not None:
            self.vllm.sync()
            return self.vllm.draw(prompts, self.config.n)
        params = SamplingParams(self.config.max_new_tokens, self.config.temperature, self.config.n)
        pad_id = self.chat.tokenizer.pad_token_id or 0
        rows = len(prompts) * params.n
        everyone = random_numbers(rows * self.ranks.size, params, self.generator)
        own = everyone[rows * self.ranks.rank : rows * (self.ranks.rank + 1)]
        with opened(self.policy):
            return sample(self.policy, prompts, params, self.chat.stop_ids, pad_id, None, self.batch_size, own)

    def scores(
        self, rows: Sequence[Prompt], pairs: Sequence[Sequence[int]], drawn: Completions
    ) -> Mapping[str, Sequence[float]]:
        """`reward`: r(x, y) of each completion, penalties included; and its parts.

        Without autocast: reward models compute in their own dtype, and functions are the user's code.
        """
        sampled = Sampled(
            rows=[rows[i] for i in drawn.prompt_index],
            prompts=pairs,
            completions=drawn.ids,
            texts=[self.chat.decode(ids) for ids in drawn.ids],
            truncated=drawn.truncated,
        )
        with torch.autocast(self.policy.device.type, enabled=False):
            return self.score(sampled)

    def log_ratios(self, pairs: Sequence[Sequence[int]], drawn: Completions) -> Tensor:
        """log pi(y | x) - log anchor(y | x), (N,) fp32 nats; 0 without an anchor."""
        if self.anchor is None:
            return torch.zeros(len(pairs))
        with opened(self.anchor):
            scored = token_logps(self.anchor, pairs, drawn.ids, self.batch_size, self.config.temperature)
        # Token by token before the sum: two long sums would cancel.
        return torch.stack([(torch.tensor(own) - other).sum() for own, other in zip(drawn.logps, scored, strict=True)])


def padded(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    advantages: Tensor,
    logps: Sequence[Sequence[float]] = (),
) -> Batch:
    """Rows of prompt and completion side by side, padding on the right."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, len(prompt) : end] = True
    return Batch(ids, mask, advantages, torch.tensor([math.fsum(row) for row in logps]))
