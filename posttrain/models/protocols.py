"""Protocols of transformers' causal LMs and reward models, with the members that the suite uses, for type checkers.

transformers is not typed, so a loaded model is checked against these protocols and not against its own class. Nothing
here exists at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from gemma2.core.json_files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CausalLM", "GenerationSettings", "ModelConfig", "Network", "RewardNetwork"]


class ModelConfig(Protocol):
    """config.json of a model, as transformers reads it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    layer_types: list[str]
    rope_parameters: JsonObject
    hidden_activation: str
    attention_bias: bool
    final_logit_softcapping: float | None
    pad_token_id: int | None
    _attn_implementation: str  # attention back end: eager, sdpa, ...

    def to_dict(self) -> JsonObject:
        """Return the content of config.json."""
        ...


class GenerationSettings(Protocol):
    """generation_config.json of a model: the token ids that start, end and pad a completion."""

    eos_token_id: int | list[int] | None
    bos_token_id: int | None
    pad_token_id: int | None


class Network(Protocol):
    """A `torch.nn.Module` with a configuration, as transformers loads it."""

    config: ModelConfig
    training: bool
    is_activation_checkpointing: bool

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        ...

    @property
    def base_model(self) -> PreTrainedModel:
        """The network without its head."""
        ...

    # Any: transformers' output object depends on the keyword arguments.
    def __call__(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """Run the forward pass."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter with its name."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every module with its name."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Yield every module."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter with a dotted name."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module with a dotted name."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name."""
        ...

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding, weight (vocabulary, hidden)."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move the parameters to a device and return the network."""
        ...

    def eval(self) -> Self:
        """Switch dropout off and return the network."""
        ...

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off and return the network."""
        ...

    def float(self) -> Self:
        """Cast to fp32, in place, and return the network."""
        ...

    def bfloat16(self) -> Self:
        """Cast to bf16, in place, and return the network."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train or freeze all parameters and return the network."""
        ...

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Write config.json and safetensors files."""
        ...


class CausalLM(Network, Protocol):
    """A causal language model: `__call__` gives logits (batch, tokens, vocabulary)."""

    generation_config: GenerationSettings
    lm_head: nn.Linear
    is_activation_checkpointing: bool

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head, weight (vocabulary, hidden)."""
        ...

    def generate(self, *args: object, **kwargs: object) -> Tensor:
        """Return sampled token ids, (batch, tokens) int64, the prompt included."""
        ...


class RewardNetwork(Network, Protocol):
    """A sequence classifier with one output: `__call__` gives logits (batch, 1)."""

    score: nn.Linear
