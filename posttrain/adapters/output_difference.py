"""How far a written output is from the model that was trained, where the base of its adapter was quantised.

    KL(trained || written) a token, and the largest difference of a logit, or of a score, over a few rows

A base that was only rounded to bf16 is not looked at: so is every model that is not trained (`models/precision.py`).
Both models are compared on the same rows; the output is read back in the precision in which a model that is not trained
is used, to main memory: the accelerator still holds the trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma2.core.json_files import JsonObject
from gemma2.core.progress import Progress
from gemma2.posttrain.models.head import head_logits
from gemma2.posttrain.models.loading import load_policy, load_reward_model
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM, RewardNetwork
from gemma2.posttrain.models.sampler import evaluating
from gemma2.posttrain.models.scorer import last_hidden_states

__all__ = ["policy_difference", "score_difference"]

ROWS, TOKENS = 4, 64
MUCH = 0.05  # nats a token: as much as RL moves a policy in many steps
CPU = torch.device("cpu")


@torch.no_grad()
def policy_difference(
    trained: CausalLM, directory: Path, rows: Sequence[Sequence[int]], progress: Progress, half: bool
) -> JsonObject:
    """Return `merged_kl`, nats a token, and `merged_logit_difference`, the largest, of the first rows of token ids.

    half: whether training used autocast. Notes the figures, as a warning if they are large.
    """
    plain = plain_model(trained)
    written, _ = load_policy(directory, frozen_dtype("auto"), CPU)
    divergences: list[Tensor] = []
    largest = 0.0
    for row in rows[:ROWS]:
        ids = list(row)[:TOKENS]
        with torch.autocast(plain.device.type, torch.bfloat16, enabled=half):
            ours = _logits(plain, ids)
        theirs = _logits(written, ids)
        largest = max(largest, float((ours - theirs).abs().max()))
        log_p, log_q = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    kl = float(torch.cat(divergences).double().mean())
    text = (
        f"the output, the adapter on the unquantised base, is {kl:.2g} nats a token from the model that was trained on "
        f"the quantised one; logits differ by at most {largest:.2g}"
    )
    if kl > MUCH:
        progress.warn(f"{text}: measure the output with gemma2 eval, or train without --base-bits")
    else:
        progress.note(text)
    return {"merged_kl": kl, "merged_logit_difference": largest}


@torch.no_grad()
def score_difference(
    score: Callable[[RewardNetwork, Sequence[Sequence[int]]], Tensor],
    trained: RewardNetwork,
    directory: Path,
    rows: Sequence[Sequence[int]],
    progress: Progress,
) -> JsonObject:
    """Return `merged_score_difference`, the largest between two scores of one of the first rows of token ids.

    score: the scores (N,) that a reward model gives rows.
    """
    written, _ = load_reward_model(directory, frozen_dtype("auto"), CPU)
    some = [list(row)[:TOKENS] for row in rows[: 2 * ROWS]]
    ours, theirs = (score(model, some).float().cpu() for model in (plain_model(trained), written))
    largest, spread = float((ours - theirs).abs().max()), float(ours.std(correction=0))
    progress.note(
        "scores of the output, the adapter on the unquantised base, differ from those of the model that was trained by "
        f"at most {largest:.2g}; they spread by {spread:.2g}"
    )
    return {"merged_score_difference": largest}


def _logits(model: CausalLM, ids: Sequence[int]) -> Tensor:
    """Logits (T, V) fp32 on the CPU."""
    with evaluating(model):
        states = last_hidden_states(model, torch.tensor([ids], device=model.device))
        return head_logits(model, states)[0].float().cpu()
