"""The members that the suite uses of transformers' causal LMs and reward models, for type checkers.

transformers is not typed, so a model that it loads is checked against these protocols and not against its classes. A
member is listed when the suite uses it; nothing here exists at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from gemma2.core.json_files import JsonObject

__all__ = ["CausalLM", "GenerationSettings", "ModelConfig", "Network"]


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
    _attn_implementation: str

    def to_dict(self) -> JsonObject:
        """The configuration as it is written to config.json."""
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
    # The backbone: its members differ between architectures, and the code that reads them checks for them first.
    model: Any
    base_model: Any
    score: nn.Linear  # of a sequence classifier: its output is the reward

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        ...

    def __call__(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """The forward pass; transformers' output object depends on the keyword arguments."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with its name."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module with its name."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Every module."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of that name."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        ...

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, weight (vocabulary, hidden)."""
        ...

    def eval(self) -> Self:
        """Switch dropout off."""
        ...

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train or freeze all parameters."""
        ...

    def float(self) -> Self:
        """Cast to fp32, in place."""
        ...

    def bfloat16(self) -> Self:
        """Cast to bf16, in place."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """The module of that name."""
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
        """The output head, weight (vocabulary, hidden)."""
        ...

    def generate(self, *args: object, **kwargs: object) -> Tensor:
        """Sampled token ids, (batch, tokens) int64, the prompt included."""
        ...
