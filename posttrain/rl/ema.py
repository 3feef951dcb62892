"""The KL anchor of WARP: an exponential moving average of the policy, kept in fp32.

    ema <- (1 - mu) ema + mu theta        after every optimizer step       (WARP 2406.16768, Algorithm 1, line 8; eq. 2)

The anchor is a whole fp32 copy of the policy, so that it scores without conversion and a bf16 policy still moves it: in
bf16, mu = 0.01 falls below the rounding of most weights and 83-98 % of the displacement is lost. It starts as the
policy, only ever scores (it never generates), and is part of every checkpoint: a resume without it would quietly
restart from the resumed policy, so it is refused.

A tied tensor is one parameter and moves once. Buffers do not move: Gemma 2's follow from its configuration.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma2.merging.errors import InputError

__all__ = ["EmaAnchor"]


class EmaAnchor:
    """An fp32 shadow of a policy. `model` scores with it; `update` moves it towards the policy."""

    def __init__(self, policy: Any) -> None:
        self.model = copy.deepcopy(policy).float().eval().requires_grad_(False)

    @property
    def shadow(self) -> dict[str, Tensor]:
        """fp32 parameters by name, tied ones once."""
        return {name: parameter.data for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def update(self, policy: Any, mu: float) -> None:
        """One step of the average, in place. `mu` is the weight of the policy, per optimizer step."""
        theta = {name: parameter.data for name, parameter in policy.named_parameters()}
        shadow = self.shadow
        torch._foreach_lerp_(list(shadow.values()), [theta[name].float() for name in shadow], mu)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the fp32 parameters by name."""
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore by name, whatever the order. Raises InputError when a name or a shape does not fit."""
        shadow = self.shadow
        if state.keys() != shadow.keys():
            odd = sorted(state.keys() ^ shadow.keys())[0]
            raise InputError(f"the saved anchor and the policy differ in {odd}", "resume with the policy it began with")
        for name, tensor in shadow.items():
            if state[name].shape != tensor.shape:
                raise InputError(
                    f"the saved anchor has {name} of shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}",
                    "resume with the policy it began with",
                )
            tensor.copy_(state[name])

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        """Restore from `save`. Raises InputError when the file is missing: the anchor must not restart in silence."""
        if not path.is_file():
            raise InputError(
                f"the checkpoint {path.parent} holds no anchor ({path.name})", "start over with --force: KL needs it"
            )
        self.load_state_dict(load_file(path))
