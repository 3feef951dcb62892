"""LoRA adapter directories in peft's layout as inputs of a merge: W' = W + scale * B @ A, computed block by block.

scale = alpha / rank (Hu et al., 2106.09685), or alpha / sqrt(rank) for rsLoRA (Kalajdzievski, 2312.03732);
`rank_pattern` and `alpha_pattern` change rank and alpha per module, by the first pattern that matches the end of its
name. Tensors that the adapter holds in full (`modules_to_save`, trained biases) replace those of the base. The adapter
of an embedding, or with `fan_in_fan_out`, belongs to a weight that is stored as (in, out): the product is transposed.

Refused by name, since W' would differ: DoRA and the other variants of peft, biases on lora_B, and initialisations that
change the base as well (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA). An adapter of a tied embedding or head: `output_heads`.
Only safetensors are read. Opening reads the configuration and the header, no tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, read_json
from gemma2.core.outputs.manifest import require_complete
from gemma2.core.outputs.safetensors_header import Tensor, printable, read_header
from gemma2.merging.kernels.dtypes import widen
from gemma2.merging.kernels.native import compiled
from gemma2.merging.kernels.number_formats import KINDS, Floats
from gemma2.merging.remote.arrivals import ON_DISK, Arrivals

from .checkpoint import Checkpoint, Reader
from .low_rank import LowRank

__all__ = ["Adapter", "Factors", "adapted_rows", "check_adapter", "is_adapter", "load_factors", "open_adapter"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
SPAN = 2048  # columns computed at a time: the sums and a few rows of A stay in the first level cache

# Keys of the configuration that are read below, or that do not change the stored weights. Any other key must be null,
# false or empty, since a variant of LoRA, including future ones, is recognised by its keys.
HARMLESS = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias"),
        *("modules_to_save", "init_lora_weights", "ensure_weight_tying", "base_model_name_or_path", "auto_mapping"),
        *("peft_version", "revision", "task_type", "inference_mode", "target_modules", "exclude_modules"),
        *("lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config"),
        *("eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"),
    }
)
# Initialisations that do not change the base.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Ending of a key -> (factor, whether it belongs to an embedding)
KINDS_OF_KEY: dict[str, tuple[Literal["a", "b"], bool]] = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
MERGE_IT = "merge it into its base with peft (merge_and_unload) and give the result"


class FactorPair(TypedDict, total=False):
    """The two factors of one module, as they are found in the file."""

    a: Tensor
    b: Tensor
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter directory. `updates` and `replaced` are keyed by the names of the base's tensors.

    base_model_name  the model that the adapter records as its base; None if it records none
    """

    role: str
    path: Path
    config: JsonMapping
    base_model_name: str | None
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]

    def __str__(self) -> str:
        return f"{self.role} {self.path}"

    @property
    def files(self) -> list[Path]:
        """The one weight file, in the form that `Reader.open` expects."""
        return [self.path / WEIGHTS]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by its name in the file."""
        pairs = [tensor for update in self.updates.values() for tensor in (update.a, update.b)]
        return {tensor.name: tensor for tensor in (*pairs, *self.replaced.values())}


@dataclass(frozen=True)
class Factors:
    """An update of a weight in memory: scale * left @ right, with left (rows, rank) and right (rank, columns) fp32."""

    left: Floats
    right: Floats
    scale: float


def is_adapter(path: Path, arrivals: Arrivals = ON_DISK) -> bool:
    """Whether a directory holds an adapter and not a model."""
    names = [*(file.name for file in path.glob("model*.safetensors*")), *arrivals.names(path)]
    return (path / CONFIG).is_file() and not any(name.startswith("model") for name in names)


def open_adapter(path: Path, role: str, arrivals: Arrivals = ON_DISK) -> Adapter:
    """Read configuration and header of an adapter directory; no tensor data.

    Raises InputError if it is not an adapter, is pickled, malformed, or a variant other than W + scale B A.
    """
    require_complete(path, role)
    config = read_json(path / CONFIG)
    _check_config(path / CONFIG, config)
    stored = arrivals.stored(path / WEIGHTS)
    if not stored.exists():
        if (path / PICKLE).exists():
            raise InputError(
                f"{role} {path} holds pickled weights only ({PICKLE})", "save it as safetensors; pickles are unsafe"
            )
        raise InputError(f"{role} {path} holds no {WEIGHTS}", "give a complete adapter directory")
    pairs, replaced = _sort(path / WEIGHTS, stored)
    name = config.get("base_model_name_or_path")
    return Adapter(
        role=role,
        path=path,
        config=config,
        base_model_name=name if isinstance(name, str) and name else None,
        updates={f"{module}.weight": _update(path, config, module, pair) for module, pair in pairs.items()},
        replaced=replaced,
    )


def _check_config(path: Path, config: JsonMapping) -> None:
    """Refuse a configuration that is not plain LoRA."""
    variant = config.get("peft_type")
    if variant != "LORA":
        raise InputError(f"{path}: peft_type is {printable(str(variant))}, only LORA can be merged here", MERGE_IT)
    for key, value in config.items():
        if key not in HARMLESS and value:
            shown = printable(str(value))
            raise InputError(f"{path} sets {printable(key)} to {shown}: not plain LoRA", MERGE_IT)
    for key, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("modules_to_save", list)):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise InputError(f"{path}: {key} is {printable(str(config[key]))}, not a {kind.__name__}", "correct it")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights is {printable(str(start))}, which changes the base as well",
            "save the adapter with path_initial_model_for_weight_conversion",
        )


def _sort(path: Path, stored: Path) -> tuple[dict[str, FactorPair], dict[str, Tensor]]:
    """Return the complete pairs by module, and the tensors stored in full by their name in the base."""
    pairs: dict[str, FactorPair] = {}
    replaced = {}
    for key, tensor in read_header(path, stored).items():
        shown = printable(key)
        if tensor.dtype not in KINDS:
            raise InputError(f"{path}: {shown} is {tensor.dtype}; only BF16, F16 and F32 can be merged", MERGE_IT)
        suffix = next((ending for ending in KINDS_OF_KEY if key.endswith(ending)), None)
        if not key.startswith(PREFIX) or (suffix is None and ".lora_" in key):
            reason = "that is DoRA" if "magnitude" in key else "not a weight of plain LoRA in peft's layout"
            raise InputError(f"{path} holds {shown}: {reason}", MERGE_IT)
        if suffix is None:
            replaced[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        part, embedding = KINDS_OF_KEY[suffix]
        pair = pairs.setdefault(key.removeprefix(PREFIX).removesuffix(suffix), {})
        if part in pair:
            raise InputError(f"{path} adapts the module of {shown} twice", "restore the file")
        pair[part] = tensor
        pair["embedding"] = embedding
    for module, pair in pairs.items():
        if not {"a", "b"} <= pair.keys():
            missing = "lora_A" if "b" in pair else "lora_B"
            raise InputError(f"{path}: {printable(module)} has no {missing}", "restore the file")
    if not pairs and not replaced:
        raise InputError(f"{path} is empty", "give a trained adapter")
    return pairs, replaced


def _update(path: Path, config: JsonMapping, module: str, pair: FactorPair) -> LowRank:
    """Return one pair with its scale; its shapes must fit each other and the rank in the configuration."""
    a, b = pair["a"], pair["b"]
    rank = _number(path, config, "r", "rank_pattern", module)
    alpha = _number(path, config, "lora_alpha", "alpha_pattern", module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            f"{path}: lora_A and lora_B of {printable(module)} are {list(a.shape)} and {list(b.shape)}, "
            f"not of rank {rank:g} as in {CONFIG}",
            "the configuration and the weights do not belong together; restore both",
        )
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a, b, scale, transposed=pair["embedding"] or bool(config.get("fan_in_fan_out")))


def _number(path: Path, config: JsonMapping, key: str, patterns: str, module: str) -> float:
    """Return a positive number of the configuration, for one module."""
    value, where = config.get(key), key
    for pattern, special in (config.get(patterns) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise InputError(
                f"{path / CONFIG}: {patterns} has {printable(pattern)}, not a regular expression ({error})",
                "correct it",
            ) from error
        if found:
            value, where = special, patterns
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**63:
        raise InputError(f"{path / CONFIG}: {where} is {printable(str(value))}, not a positive number", "correct it")
    return value


def check_adapter(adapter: Adapter, base: Checkpoint) -> None:
    """Check that every tensor of the adapter fits one of the base. Raises InputError naming both."""
    shapes: dict[str, tuple[int, ...]] = {name: update.shape for name, update in adapter.updates.items()}
    shapes |= {name: tensor.shape for name, tensor in adapter.replaced.items()}
    for name, shape in shapes.items():
        if name not in base.tensors:
            raise InputError(
                f"{adapter} changes {printable(name)}, which {base} does not have",
                f"give the model that it was trained on ({printable(adapter.base_model_name or 'not recorded')})",
            )
        if base.tensors[name].shape != shape:
            raise InputError(
                f"{adapter} is for a {printable(name)} of {list(shape)}, in {base} it is "
                f"{list(base.tensors[name].shape)}",
                f"give the model that it was trained on ({printable(adapter.base_model_name or 'not recorded')})",
            )


def load_factors(reader: Reader, update: LowRank) -> Factors:
    """Read A and B of one update. Raises InputError if one holds NaN or Inf."""
    a, b = (_matrix(reader, tensor) for tensor in (update.a, update.b))
    left, right = (a.T, b.T) if update.transposed else (b, a)
    return Factors(np.ascontiguousarray(left), np.ascontiguousarray(right), update.scale)


def _matrix(reader: Reader, tensor: Tensor) -> Floats:
    raw = np.empty(tensor.nbytes, np.uint8)
    reader.read(tensor, 0, tensor.count, raw)
    values = np.empty(tensor.count, np.float32)
    widen(raw, KINDS[tensor.dtype], values)
    if not np.isfinite(values).all():
        raise InputError(
            f"{tensor.file}: {printable(tensor.name)} holds NaN or Inf", "the adapter is broken; use an earlier one"
        )
    return values.reshape(tensor.shape)


def adapted_rows(block: Floats, factors: Factors, first: int) -> None:
    """Add the update to elements [first, first + block.size) of its weight, fp32, in place.

    The order of the sum over the rank is fixed and every element is computed separately: any cut gives the same bits.
    """
    _add_product(block, factors.left, factors.right, np.float32(factors.scale), first)


@compiled()
def _add_product(block: Floats, left: Floats, right: Floats, scale: np.float32, first: int) -> None:
    """`block[i] += scale * (left @ right).flat[first + i]`; no fused or reordered arithmetic (no fastmath)."""
    rank, columns = right.shape
    sums = np.empty(min(SPAN, columns), np.float32)
    position = 0
    while position < block.size:
        row, start = divmod(first + position, columns)
        size = min(SPAN, columns - start, block.size - position)
        total, part = sums[:size], block[position : position + size]
        total[:] = 0
        whole = rank - rank % 4
        for k in range(0, whole, 4):  # four rows of A for each load and store of the sums, in the same order
            w0, w1, w2, w3 = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
            r0, r1 = right[k, start : start + size], right[k + 1, start : start + size]
            r2, r3 = right[k + 2, start : start + size], right[k + 3, start : start + size]
            for i in range(size):
                total[i] = (((total[i] + w0 * r0[i]) + w1 * r1[i]) + w2 * r2[i]) + w3 * r3[i]
        for k in range(whole, rank):
            weight, line = left[row, k], right[k, start : start + size]
            for i in range(size):
                total[i] += weight * line[i]
        for i in range(size):
            part[i] += scale * total[i]
        position += size
