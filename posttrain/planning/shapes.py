"""Widths, depths and sizes of a model: from its files, from files of the hub, or from the name of a size. Torch-free.

Sizes: Gemma 2 report (2408.00118), Table 1, with the vocabulary of the Hugging Face release (256,000 rows; the report
counts 256,128). "Feedforward dim" of the report is gate and up together; `inner` is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, read_json
from gemma2.core.outputs.safetensors_header import parameter_count

__all__ = ["SIZES", "ModelShape", "shape_of", "shape_of_config", "shape_of_parameters"]

WINDOW, CONTEXT = 4096, 8192
FOUR_BIT_BLOCK, SCALES, TABLES = 64, 256, 16 + 256 + 1  # of quantisation/nf4.py: elements, scales, fp32 numbers
DEFAULT_WINDOWED = frozenset({"gemma2"})


@dataclass(frozen=True)
class ModelShape:
    """The figures of a network that decide how much memory it takes. Tokens, elements, layers.

    inner         width of gate and of up
    groups        key-value heads
    local_layers  layers that see `window` tokens only; window: None without such layers
    capped        whether attention has a soft cap
    tied          whether the output head is the embedding
    outputs       rows of a classifier's head; 0 for a language model
    """

    parameters: float
    hidden: int = 0
    inner: int = 0
    layers: int = 0
    heads: int = 0
    groups: int = 0
    head_dim: int = 0
    vocabulary: int = 0
    window: int | None = None
    local_layers: int = 0
    capped: bool = True
    tied: bool = True
    outputs: int = 0
    context: int = CONTEXT
    model_type: str = "gemma2"

    @property
    def embedding(self) -> int:
        """Elements of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def tensors(self) -> int:
        """Number of tensors: eleven in a layer (Gemma 2: seven matrices and four norms), embedding and last norm."""
        return 11 * self.layers + 2

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block, by name."""
        queries, keys = self.heads * self.head_dim, self.groups * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    def adapted(self, targets: Collection[str]) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block that have adapters. No targets: all."""
        return [
            size
            for name, size in self.linear_layers().items()
            if not targets or any(name == target.rpartition(".")[2] for target in targets)
        ]

    def adapter_parameters(self, rank: int, targets: Collection[str] = ()) -> float:
        """Elements of A and B of all layers; a classifier's head is trained as a copy."""
        of_block = sum(rank * (inputs + outputs) for inputs, outputs in self.adapted(targets))
        return float(self.layers * of_block + self.outputs * self.hidden)

    def adapted_weights(self, targets: Collection[str] = ()) -> float:
        """Elements of the weights that adapters are added to."""
        return float(self.layers * sum(inputs * outputs for inputs, outputs in self.adapted(targets)))

    def linear_elements(self) -> float:
        """Elements of the linear layers of all blocks."""
        return float(self.layers * sum(inputs * outputs for inputs, outputs in self.linear_layers().values()))

    def quantised_bytes(self, bits: int, item: float) -> float:
        """Bytes of the model with the linear layers of its blocks in 4 or 8 bits, the rest in `item` bytes an element.

        A matrix of n elements takes n / 2 + n / 64 + 4 n / (64 * 256) bytes and two tables in 4 bits, 4.127 bits an
        element; n and 4 for each output in 8 (`quantisation/nf4.py`, `quantised_linear.py`).
        """
        packed = 0.0
        for inputs, outputs in self.linear_layers().values():
            n = inputs * outputs
            if bits == 4:
                groups = math.ceil(n / FOUR_BIT_BLOCK)
                packed += groups * (FOUR_BIT_BLOCK / 2 + 1) + 4 * math.ceil(groups / SCALES) + 4 * TABLES
            else:
                packed += n + 4 * outputs
        return self.layers * packed + item * (self.parameters - self.linear_elements())

    def largest_matrix(self) -> float:
        """Elements of the largest linear layer of a block."""
        return float(max(inputs * outputs for inputs, outputs in self.linear_layers().values()))

    def cache_columns(self, tokens: int, windowed: bool) -> float:
        """Columns of keys that one row of `tokens` tokens has in all layers together.

        windowed  whether local layers keep their window only, as vLLM does; our sampler keeps all columns
        """
        near = tokens if self.window is None or not windowed else min(tokens, self.window)
        return float(self.local_layers * near + (self.layers - self.local_layers) * tokens)

    def cache_bytes(self, tokens: int, item: int, windowed: bool = False) -> float:
        """Bytes of the keys and values of one row."""
        return 2.0 * self.groups * self.head_dim * item * self.cache_columns(tokens, windowed)

    def scores_bytes(self, tokens: int, item: int = 4) -> float:
        """Bytes of the attention scores of one row in one layer, all queries by all keys."""
        return float(self.heads) * tokens * tokens * item


def _gemma2(hidden: int, layers: int, heads: int, groups: int, head_dim: int, inner: int) -> ModelShape:
    shape = ModelShape(0, hidden, inner, layers, heads, groups, head_dim, 256_000, WINDOW, math.ceil(layers / 2))
    return replace(shape, parameters=float(_count(shape)))


def _count(shape: ModelShape) -> int:
    """Parameters of a Gemma 2 of this shape: matrices, four norms per layer, the last norm, the embedding once."""
    of_block = sum(inputs * outputs for inputs, outputs in shape.linear_layers().values()) + 4 * shape.hidden
    heads = shape.embedding if shape.tied else 2 * shape.embedding
    return heads + shape.layers * of_block + shape.hidden + shape.outputs * shape.hidden


SIZES: dict[str, ModelShape] = {
    "2b": _gemma2(2304, 26, 8, 4, 256, 9216),
    "9b": _gemma2(3584, 42, 16, 8, 256, 14336),
    "27b": _gemma2(4608, 46, 32, 16, 128, 36864),
}


def shape_of_config(config: JsonMapping, parameters: float | None = None) -> ModelShape:
    """Return the shape that a config.json states. `parameters`: those of the files; default: what the shape has.

    Keys that are missing count as 0: a plan then lacks what depends on them.
    """

    def number(key: str, default: int = 0) -> int:
        value = config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default

    hidden, layers, heads = (number(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kinds = config.get("layer_types")
    kind = str(config.get("model_type", ""))
    window = number("sliding_window") or None
    if isinstance(kinds, list):
        local = sum(one == "sliding_attention" for one in kinds)
    elif kind in DEFAULT_WINDOWED:
        local = math.ceil(layers / 2)
    else:
        local = layers if window is not None else 0
    classifies = any("SequenceClassification" in str(name) for name in config.get("architectures") or ())
    shape = ModelShape(
        0,
        hidden,
        number("intermediate_size"),
        layers,
        heads,
        number("num_key_value_heads", heads),
        number("head_dim", hidden // heads if heads else 0),
        number("vocab_size"),
        window if local else None,
        local,
        config.get("attn_logit_softcapping") is not None,
        config.get("tie_word_embeddings", kind.startswith("gemma")) is not False,
        (len(config.get("id2label") or {}) or 1) if classifies else 0,
        number("max_position_embeddings", CONTEXT),
        kind,
    )
    return replace(shape, parameters=float(_count(shape) if parameters is None else parameters))


def shape_of_parameters(parameters: float) -> ModelShape:
    """Return the shape of a model of which only the number of parameters is known; it may be NaN."""
    return ModelShape(parameters)


def shape_of(path: Path) -> ModelShape:
    """Return the shape of a model directory, or that of a size: 2b, 9b, 27b. Reads headers and config.json only.

    Raises InputError if the path is neither.
    """
    if path.is_dir():
        return shape_of_config(read_json(path / "config.json"), parameter_count(path))
    size = SIZES.get(str(path).lower())
    if size is None:
        raise InputError(f"{path} is not a model directory", f"give one, or a size: {', '.join(SIZES)}")
    return size
