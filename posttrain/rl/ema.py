"""The KL anchor of WARP: an exponential moving average of the policy, kept in fp32.

    ema <- (1 - mu) ema + mu theta        after every optimizer step       (WARP 2406.16768, Algorithm 1, line 8; eq. 2)

The average is kept in fp32, so that a bf16 policy still moves it: in bf16, mu = 0.01 falls below the rounding of most
weights and 83-98 % of the displacement is lost. It starts as the policy, only ever scores (it never generates), and is
part of every checkpoint: a resume without it would quietly restart from the resumed policy, so it is refused.

    gpu     the average is the model that scores, in fp32 where the policy is
    cpu     the average is kept in the memory of the host; a bf16 copy of it scores. Half the memory of an accelerator,
            one transfer of the weights per step, and log-probs to the precision of bf16

Under LoRA a policy is theta = W + s B A with W frozen. The average of theta is a dense matrix that no factors hold:

    dense   ema of W + s B A, weight by weight: exact; what is not adapted is shared with the policy
    factors ema of A and of B: as small as the adapter, and an approximation, since the average of a product is not the
            product of the averages

Where the base of the adapter is quantised (--base-bits) W is the quantised matrix, the same in policy and anchor, and
`dense` keeps an fp32 matrix of every adapted layer.

A tied tensor is one parameter and moves once. Buffers do not move: Gemma 2's follow from its configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemma2.core.errors import InputError
from gemma2.posttrain.adapters.merged_output import Products, products_of
from gemma2.posttrain.models.lora import adapted_weights, merged_copy, with_weights
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.quantisation.quantised_linear import dequantised

__all__ = ["EmaAnchor", "FactorAnchor", "LoraAnchor"]

Memory = Literal["gpu", "cpu"]
Theta = Iterator[tuple[str, Tensor]]


class EmaAnchor:
    """An fp32 average of a policy that is trained in full. `model` scores with it; `update` moves it to the policy."""

    def __init__(self, policy: CausalLM, memory: Memory = "gpu") -> None:
        self._begin(copy.deepcopy(policy).float(), [name for name, _ in policy.named_parameters()], memory)

    def _begin(self, model: CausalLM, moving: list[str], memory: Memory) -> None:
        """`model`: the start of the anchor, fp32; `moving`: those of its parameters that are averaged."""
        self.model = model.eval().requires_grad_(False)
        self.memory = memory
        averaged = {name: self.model.get_parameter(name).data for name in moving}
        if memory == "cpu":
            averaged = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in averaged.items()}
            self.model = self.model.bfloat16()
        self.shadow: dict[str, Tensor] = averaged  # fp32 parameters by name, tied ones once

    def theta(self, policy: CausalLM) -> Theta:
        """(name, current value) of every averaged parameter."""
        for name, parameter in policy.named_parameters():
            yield name, parameter.data

    @torch.no_grad()
    def update(self, policy: CausalLM, mu: float) -> None:
        """One step of the average, in place. `mu` is the weight of the policy, per optimizer step."""
        for name, value in self.theta(policy):
            tensor = self.shadow[name]
            tensor.lerp_(value.to(tensor.device, torch.float32), mu)
        self._refresh()

    def _refresh(self) -> None:
        """Update the copy that scores, if that is not the average itself."""
        if self.memory == "cpu":
            for name, tensor in self.shadow.items():
                self.model.get_parameter(name).data.copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a checkpoint must hold: the fp32 average by name."""
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore by name, whatever the order. Raises InputError when a name or a shape does not fit."""
        if state.keys() != self.shadow.keys():
            odd = sorted(state.keys() ^ self.shadow.keys())[0]
            raise InputError(f"the saved anchor and the policy differ in {odd}", "resume with the policy it began with")
        for name, tensor in self.shadow.items():
            if state[name].shape != tensor.shape:
                raise InputError(
                    f"the saved anchor has {name} of shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}",
                    "resume with the policy it began with",
                )
            tensor.copy_(state[name])
        self._refresh()

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

    def products(self) -> Products:
        """What the average adds to the base of an adapter, for a base that is read again; none without adapters."""
        return {}

    @torch.no_grad()
    def plain(self) -> CausalLM:
        """The anchor as a plain fp32 model, for the disk. The run is over: the copy that scores is used up."""
        if self.memory == "cpu":
            self.model = self.model.float()
            for name, tensor in self.shadow.items():
                self.model.get_parameter(name).data.copy_(tensor)
        return self.model


class LoraAnchor(EmaAnchor):
    """The exact average of a LoRA policy: of the products, in the places of the weights that they are added to.

    policy: the causal LM with adapters in its layers; base: `lora.sharing_copy` of it from before it had them.
    """

    def __init__(self, policy: CausalLM, base: CausalLM, memory: Memory = "gpu") -> None:
        self.base = base
        model = merged_copy(base, policy)
        adapted = [name for name, _ in adapted_weights(policy)]
        self._begin(copy.deepcopy(model) if memory == "cpu" else model, adapted, memory)

    def theta(self, policy: CausalLM) -> Theta:
        yield from adapted_weights(policy)

    def products(self) -> Products:
        """The average less the weights that the adapters were added to."""

        def product(name: str) -> Tensor:
            linear = cast(nn.Linear, self.base.get_submodule(name.rpartition(".")[0]))
            return self.shadow[name].cpu() - dequantised(linear).float().cpu()

        return {name: partial(product, name) for name in self.shadow}

    def plain(self) -> CausalLM:
        """The average in the places of the adapted weights; the other weights are the policy's, never rounded."""
        return with_weights(self.base, self.shadow.items())


class FactorAnchor(EmaAnchor):
    """The factor-wise approximation: averages of A and of B. What is not adapted is shared with the policy."""

    def __init__(self, policy: CausalLM, base: CausalLM) -> None:
        self.base = base
        frozen = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
        self._begin(copy.deepcopy(policy, frozen), [name for name, _ in self.theta(policy)], "gpu")

    def theta(self, policy: CausalLM) -> Theta:
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                yield name, parameter.data

    def products(self) -> Products:
        """The products of the averaged factors."""
        return products_of(self.model)

    def plain(self) -> CausalLM:
        """The averaged factors multiplied out and added to the weights."""
        return merged_copy(self.base, self.model)
