"""Silences of RL: sampler, rewards, advantages and anchor. Importing this adds them to `silences.SILENCES`."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from silences import Patch, silence, wrap
from training_jobs import rl, with_fields

from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.rl import objective, rlhf, rollout
from gemma2.posttrain.rl.ema import EmaAnchor
from gemma2.posttrain.rl.rollout import Rollout


@silence("sampler with stale weights", rl, "the samples are of another policy|not the one that was sampled")
def stale_sampler(patch: Patch) -> None:
    copies: list[torch.nn.Module] = []

    def stale(original, policy, *given):
        copies.append(copy.deepcopy(policy))
        return original(copies[0], *given)

    wrap(patch, rollout, "sample", stale)


@silence("another temperature in the sampler", rl, "the samples are of another policy")
def other_temperature(patch: Patch) -> None:
    wrap(patch, rollout, "SamplingParams", lambda original, limit, heat, n: original(limit, 2 * heat, n))


@silence("dropout in the loss", rl, "the policy that is updated is not the one that was sampled")
def dropout_in_the_loss(patch: Patch) -> None:
    wrap(patch, objective, "last_hidden_states", lambda original, *given: F.dropout(original(*given), 0.2))


@silence("prompt in the loss of RL", rl, "not its completion")
def prompt_in_the_loss(patch: Patch) -> None:
    def everything(original, *given):
        batch = original(*given)
        return dataclasses.replace(batch, mask=batch.ids != 0)

    wrap(patch, rollout, "padded", everything)


@silence("shuffled rewards", rl, "in its batch, and")
def shuffled_rewards(patch: Patch) -> None:
    wrap(patch, RewardModel, "score", lambda original, *given: original(*given).flip(0))


@silence("shuffled rewards, penalties included", with_fields(rl, length_penalty=0.1), "in its batch, and")
def shuffled_totals(patch: Patch) -> None:
    def turned(original, *given):
        return {name: list(column)[::-1] for name, column in original(*given).items()}

    wrap(patch, Rollout, "scores", turned)


@silence("advantages all zero", rl, "advantages are not reward - beta KL")
def no_advantages(patch: Patch) -> None:
    patch.setattr(rollout, "leave_one_out", lambda rewards, n: torch.zeros_like(rewards))


@silence("KL with the wrong sign", with_fields(rl, beta=1.0), "advantages are not reward - beta KL")
def wrong_sign(patch: Patch) -> None:
    wrap(patch, rollout, "anchored_rewards", lambda original, rewards, ratios, beta: original(rewards, ratios, -beta))


@silence("log-ratio with the wrong sign", rl, "log pi - log anchor of a completion is")
def wrong_ratio(patch: Patch) -> None:
    wrap(patch, Rollout, "log_ratios", lambda original, *given: -original(*given))


@silence("anchor is never updated", rl, "the anchor did not move by mu")
def frozen_anchor(patch: Patch) -> None:
    patch.setattr(EmaAnchor, "update", lambda self, policy, mu: None)


@silence("anchor follows the policy at once", rl, "the anchor did not move by mu")
def anchor_is_policy(patch: Patch) -> None:
    wrap(patch, EmaAnchor, "update", lambda original, self, policy, mu: original(self, policy, 1.0))


@silence("anchor rounded to bf16 in place", with_fields(rl, lora_rank=2), "the anchor did not move by mu")
def rounded_anchor(patch: Patch) -> None:
    def rounded(original, self, policy, mu):
        original(self, policy, mu)
        for tensor in self.shadow.values():
            tensor.copy_(tensor.bfloat16())

    wrap(patch, EmaAnchor, "update", rounded)


@silence("anchor kept in bf16", with_fields(rl, anchor_memory="cpu"), "the anchor is kept in torch.bfloat16")
def anchor_in_bf16(patch: Patch) -> None:
    def halved(original, self, *given):
        original(self, *given)
        self.shadow = {name: tensor.bfloat16() for name, tensor in self.shadow.items()}

    wrap(patch, EmaAnchor, "_begin", halved)


@silence("the copy that scores is not refreshed", with_fields(rl, anchor_memory="cpu"), "is not its average")
def stale_copy(patch: Patch) -> None:
    patch.setattr(EmaAnchor, "_refresh", lambda self: None)


@silence("SFT policy that moves with the policy", rl, "the SFT policy changed")
def moving_reference(patch: Patch) -> None:
    def shared(original, *given):
        setup = original(*given)
        for own, other in zip(setup.reference.parameters(), setup.rollout.policy.parameters(), strict=True):
            own.data = other.data
        return setup

    wrap(patch, rlhf, "prepare", shared)


@silence("tokenizer of a sibling", rl, "has other tokens than --policy")
def sibling_tokenizer(patch: Patch) -> None:
    def sibling(original, config, progress):
        other = config.reward[0].with_name("sibling")
        if not other.is_dir():
            write_sibling(config.reward[0], other)
        original(config.model_copy(update={"reward": (other,)}), progress)

    wrap(patch, rlhf, "warn_of_other_tokens", sibling)


def write_sibling(reward: Path, other: Path) -> None:
    """The same reward model with a tokenizer in which two pieces exchanged their ids."""
    other.mkdir()
    tokenizer = json.loads((reward / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
