"""Gemma 2's soft caps and windows, seen at work in every path that a training takes. Eager attention only.

On twelve tokens, with caps and a window so small that they matter for any weights, five things must agree:
transformers' own forward pass, our attention in blocks or with our masks (`scorer.py`), the head with its soft cap
(Gemma 2 report, 2408.00118, section 2), the fused cross-entropy, and the sampler. A path that drops one of them would
train another model than the one that is loaded later, without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from gemma2.core.errors import GuardStop
from gemma2.posttrain.models.head import HALF, head_logits
from gemma2.posttrain.models.protocols import CausalLM, Network
from gemma2.posttrain.models.sampler import SamplingParams, evaluating, sample
from gemma2.posttrain.models.scorer import last_hidden_states, token_logps

__all__ = ["check_forward"]

TOKENS, WINDOW, DRAWN = 12, 4, 2
CAP = 0.5  # of attention scores; those of trained and of random weights are larger
# Of the largest value; measured: 1e-6 in fp32, 6e-3 for the frozen base of an adapter in bf16.
TOLERANCE, TOLERANCE_HALF = 2e-3, 3e-2
HINT = "check the versions of torch and transformers, or report it; nothing was trained"


@torch.no_grad()
def check_forward(model: Network) -> None:
    """Raise GuardStop for a Gemma 2 whose soft caps or windows are dropped on the way. `model`: without peft's wrapper.

    Other architectures and attention back ends are not looked at.
    """
    config = model.config
    if config.model_type != "gemma2" or config._attn_implementation != "eager":
        return
    ids = (torch.arange(TOKENS, device=model.device) * 7919 % (config.vocab_size - 1) + 1)[None]
    with evaluating(model):
        states = [_own(model, ids)]
        with _settings(model, CAP, None):
            states.append(_own(model, ids))
        with _settings(model, CAP, WINDOW):
            states.append(_own(model, ids))
            _check_attention(states, last_hidden_states(model, ids), _tolerance(model))
            if hasattr(model, "lm_head"):
                _check_head(cast(CausalLM, model), ids, states[-1])


def _own(model: Network, ids: Tensor) -> Tensor:
    states: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states


def _tolerance(model: Network) -> float:
    return TOLERANCE_HALF if model.dtype in HALF else TOLERANCE


def _check_attention(states: Sequence[Tensor], ours: Tensor, tolerance: float) -> None:
    """states: transformers' with the model's own settings, with another cap, and with another window as well."""
    for before, after, what in zip(states, states[1:], ("soft cap", "window"), strict=False):
        if torch.equal(before, after):
            raise GuardStop(f"transformers' eager attention ignores the {what} of Gemma 2", HINT)
    _agree(ours, states[-1], "the attention that training uses", float(states[-1].abs().max()), tolerance)


def _check_head(model: CausalLM, ids: Tensor, states: Tensor) -> None:
    """Compare the heads and the sampler with the formula, with a cap that most logits exceed."""
    raw = model.get_output_embeddings()(states[0]).float()
    cap, limit = float(raw.abs().max()) / 8, _tolerance(model)
    before, model.config.final_logit_softcapping = model.config.final_logit_softcapping, cap or None
    if not cap:
        return
    try:
        expected = torch.tanh(raw / cap) * cap
        _agree(model(input_ids=ids, use_cache=False).logits[0].float(), expected, "transformers' head", cap, limit)
        _agree(head_logits(model, states[0]), expected, "the head of the scorer", cap, limit)
        tokens = ids[0].tolist()
        drawn = sample(model, [tokens], SamplingParams(DRAWN), [], 0, torch.Generator().manual_seed(0))
        scored = token_logps(model, [tokens], drawn.ids)[0]
        first = torch.log_softmax(expected[-1], -1)[drawn.ids[0][0]]
        _agree(scored[:1], first[None].cpu(), "the scorer", cap, limit)
        _agree(torch.tensor(drawn.logps[0]), scored, "the sampler", cap, limit)
    finally:
        model.config.final_logit_softcapping = before


def _agree(found: Tensor, expected: Tensor, what: str, size: float, limit: float) -> None:
    difference = float((found - expected).abs().max()) / max(size, 1e-6)
    if not difference <= limit:
        raise GuardStop(
            f"{what} computes another model, by {difference:.1g}: soft cap or window are not those of Gemma 2", HINT
        )


@contextmanager
def _settings(model: Network, cap: float, window: int | None) -> Iterator[None]:
    """Give every layer this soft cap, and the local ones this window, while the context is open."""
    layers = [module for module in model.modules() if hasattr(module, "attn_logit_softcapping")]
    changes = [(place, "attn_logit_softcapping", cap) for place in (model.config, *layers)]
    if window is not None:
        local = [layer for layer in layers if getattr(layer, "sliding_window", None) is not None]
        changes += [(place, "sliding_window", window) for place in (model.config, *local)]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, old in before:
            setattr(place, name, old)
