"""What ran is what was asked, in RL: the first two batches, their loss and their anchor are computed a second way.

sampler    the log-probs of the shortest completion are those that the scorer gives the policy
KL         its log-ratio is log pi - log anchor, with this sign
reward     a completion, read alone, gets the reward it got in the first batch; not where functions are part of the
           reward: a call may cost money, or depend on the others of its batch
batch      what is learned of a row is its completion; r - beta KL, less the mean of the others, is its advantage
loss       - mean of advantage times log pi, with the log-probs of the sampler (`check_loss`)
anchor     an element moves by mu (theta - anchor), in fp32; the SFT policy never (`FirstAnchors`)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2.core.errors import GuardStop
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models.loading import default_device
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import Completions
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.sharding.lending import is_lent, opened, product_dtype
from gemma2.posttrain.sharding.units import local
from gemma2.posttrain.training.first_steps import STEPS

from .ema import EmaAnchor

__all__ = [
    "FirstAnchors",
    "Seen",
    "alone",
    "check_batch",
    "check_log_probs",
    "check_loss",
    "check_reward",
    "row_to_score",
]

SAMPLE = 2**10  # elements per tensor
SCORED = 16  # tokens of a completion that are scored again
# Of a log-prob, nats; of a reward, in its own size. bf16 keeps 8 bits.
TOLERANCE, TOLERANCE_HALF = 3e-4, 5e-2
ULPS = 8
HINT = "nothing more was trained; check the versions of torch and transformers, or report it"


@dataclass(frozen=True)
class Seen:
    """A batch of completions with everything that was computed for it; one entry per completion."""

    rows: Sequence[Prompt]
    prompts: Sequence[Sequence[int]]
    drawn: Completions
    rewards: Tensor
    log_ratios: Tensor
    ids: Tensor
    mask: Tensor
    advantages: Tensor


def tolerance(model: CausalLM) -> float:
    """The rounding of a model's log-probs, as it runs now."""
    half = (
        product_dtype(model) != torch.float32
        or torch.is_autocast_enabled(default_device().type)
        or torch.is_autocast_enabled("cpu")
    )
    return TOLERANCE_HALF if half else TOLERANCE


def check_log_probs(policy: CausalLM, anchor: CausalLM | None, seen: Seen, temperature: float) -> None:
    """Raise GuardStop if sampler and scorer, or log-ratio and anchor, disagree on the shortest completion."""
    i = shortest_completion(seen)
    prompt, ids = [seen.prompts[i]], seen.drawn.ids[i]
    own = torch.tensor(seen.drawn.logps[i])
    with opened(policy):
        again = token_logps(policy, prompt, [ids[:SCORED]], 1, temperature)[0]
    difference = float((own[:SCORED] - again).abs().max())
    if not difference <= tolerance(policy):
        raise GuardStop(
            f"sampler and policy differ by {difference:.2g} nats for a token: the samples are of another policy", HINT
        )
    if anchor is None or (not is_lent(anchor) and not float(seen.log_ratios.abs().max())):
        return
    with opened(anchor):  # on every process, whatever its own log-ratios are
        expected = float((own - token_logps(anchor, prompt, [ids], 1, temperature)[0]).sum())
    if not abs(float(seen.log_ratios[i]) - expected) <= max(tolerance(policy), tolerance(anchor)) / 3 * len(ids):
        raise GuardStop(
            f"log pi - log anchor of a completion is {seen.log_ratios[i]:.3g} in the reward, {expected:.3g} by itself",
            HINT,
        )


def shortest_completion(seen: Seen) -> int:
    """The number of the row that is cheapest to score."""
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(seen.prompts, seen.drawn.ids, strict=True)]
    return min(range(len(lengths)), key=lengths.__getitem__)


def row_to_score(seen: Seen) -> int:
    """The number of the row whose reward is computed again, alone: the one that is farthest from the mean."""
    return int((seen.rewards - seen.rewards.mean()).abs().argmax())


def alone(seen: Seen, i: int) -> tuple[list[Prompt], list[Sequence[int]], Completions]:
    """The arguments of a reward for one completion."""
    drawn = seen.drawn
    one = Completions([drawn.ids[i]], [drawn.logps[i]], [drawn.truncated[i]], [0])
    return [seen.rows[drawn.prompt_index[i]]], [seen.prompts[i]], one


def check_reward(found: float, again: float, where: str) -> None:
    """Raise GuardStop if a completion gets another reward alone than in its batch."""
    if not abs(found - again) <= TOLERANCE_HALF * max(1.0, abs(again)):
        raise GuardStop(
            f"a completion for {where or 'a prompt'} got the reward {found:.4g} in its batch, and {again:.4g} alone",
            "rewards are not those of their rows: report it",
        )


def check_batch(seen: Seen, beta: float, n: int) -> None:
    """Raise GuardStop if targets or advantages of a batch are not those of its completions and rewards."""
    for ids, mask, completion in zip(seen.ids, seen.mask, seen.drawn.ids, strict=True):
        if ids[mask].tolist() != list(completion):
            raise GuardStop("what is learned of a row is not its completion", HINT)
    objective = (seen.rewards.double() - beta * seen.log_ratios.double()).view(-1, n)
    expected = (objective - objective.mean(1, keepdim=True)) * n / (n - 1)
    if not (expected.isfinite().all() and seen.advantages.isfinite().all()):
        return  # the gradient's guard stops the step
    difference = (expected.flatten() - seen.advantages.double()).abs().max()
    if not float(difference) <= TOLERANCE / 10 * max(1.0, float(objective.abs().max())):
        raise GuardStop(
            f"advantages are not reward - beta KL, less the mean of the others: one is off by {float(difference):.3g}",
            HINT,
        )


def check_loss(policy: CausalLM, loss: Tensor, advantages: Tensor, sampled: Tensor, mask: Tensor) -> None:
    """Raise GuardStop if a loss is not the one that the sampler's log-probs give.

    loss: of a micro-batch; advantages, sampled: (N,) with the summed log-probs of each completion; mask: (N, T).
    """
    expected = float(-(advantages * sampled).mean())
    limit = tolerance(policy) * float((advantages.abs() * mask.sum(1)).mean()) + 1e-5
    if math.isfinite(float(loss)) and not abs(float(loss) - expected) <= limit:
        raise GuardStop(
            f"the loss is {float(loss):.6g}, and {expected:.6g} with the log-probs of the sampler: the policy that is "
            "updated is not the one that was sampled",
            HINT,
        )


class FirstAnchors(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Watches the first updates of an anchor, and that the SFT policy stays as it is.

    Must be added after `AnchorUpdate`. anchor: None for one that is fixed; scores: the model that the KL is taken to;
    rate: (mu, steps between two updates). Of a sharded run each process looks at its shards.
    """

    def __init__(
        self,
        policy: CausalLM,
        reference: CausalLM,
        anchor: EmaAnchor | None,
        scores: CausalLM | None,
        rate: tuple[float, int],
    ) -> None:
        self.policy, self.reference, self.anchor, self.scores = policy, reference, anchor, scores
        self.mu, self.every = rate
        self.left, self.updates = STEPS, STEPS
        self.fixed: list[Tensor] = []
        self.averages: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.fixed = self._reference()
        if self.anchor is None:
            return
        if self.scores is not self.anchor.model:
            raise GuardStop("the KL is taken to another model than the anchor that is kept", HINT)
        for name, average in self.anchor.shadow.items():
            if average.dtype != torch.float32:
                raise GuardStop(f"the anchor is kept in {average.dtype}, where it does not move: {name}", HINT)
            self.averages[name] = _sample(average).double()

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        step = f"step {state.global_step + 1}"
        due = (state.global_step + 1) % self.every == 0
        if self.left and not all(map(torch.equal, self.fixed, self._reference())):
            raise GuardStop(f"{step}: the SFT policy changed, to which the KL is measured", HINT)
        if self.anchor is not None and (self.left or (due and self.updates)):
            self._check_average(self.anchor, step, self.mu if due else 0.0)
            self.updates -= due
        self.left = max(0, self.left - 1)

    def _reference(self) -> list[Tensor]:
        """A sample of the SFT policy's weights; without any where it is lent the frozen weights of the policy."""
        return [] if is_lent(self.reference) else [_sample(parameter) for parameter in self.reference.parameters()]

    def _check_average(self, anchor: EmaAnchor, step: str, mu: float) -> None:
        for name, value in anchor.theta(self.policy):
            before, theta = self.averages[name], _sample(value).double()
            after = _sample(anchor.shadow[name]).double()
            size = torch.maximum(before.abs(), theta.to(before.device).abs())
            wrong = (after - (before + mu * (theta.to(before.device) - before))).abs() > ULPS * 2**-24 * size
            if bool(wrong.any()):
                raise GuardStop(f"{step}: the anchor did not move by mu = {mu:g} towards the policy: {name}", HINT)
            self.averages[name] = after
            if is_lent(anchor.model):  # it has no other weights than the average
                continue
            scoring = _sample(anchor.model.get_parameter(name))
            if not torch.equal(scoring, after.to(scoring.device, scoring.dtype)):
                raise GuardStop(f"{step}: the anchor that scores is not its average: {name}", HINT)


def _sample(tensor: Tensor) -> Tensor:
    flat = local(tensor.detach()).reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLE))].clone()
