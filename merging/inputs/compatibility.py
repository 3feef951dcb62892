"""Checks that model directories can be merged: configuration, tensors, tokenizers. Reads no tensor data.

Every refusal names the key, both values and both directories. Nothing is truncated, renamed or dropped to make
models fit.
"""

from __future__ import annotations

from collections.abc import Collection

from gemma2.core.errors import InputError
from gemma2.core.foreign.code_keys import refuse_code
from gemma2.core.foreign.links import refuse_outside_links
from gemma2.core.json_files import read_json
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.outputs.tokenizer_ids import tokenizer_difference
from gemma2.merging.kernels.number_formats import KINDS

from .architecture import ONE_KIND, check_sizes, head_of
from .checkpoint import COMPANIONS, Checkpoint
from .config_keys import SHAPES, ConfigDifference, config_differences, is_allowed
from .families import check_family

__all__ = [
    "check_model",
    "check_same_architecture",
    "check_same_tensors",
    "check_same_tokenizer",
]

# Keys of weights that are not plain numbers; those that choose code are `refuse_code`'s.
FORBIDDEN_KEYS = {
    "quantization_config": "has quantised weights",
}
ONE_ARCHITECTURE = "merge models of one architecture"


def check_model(model: Checkpoint) -> None:
    """Refuse a model that cannot be merged, or not safely. Raises InputError."""
    refuse_code(model.origin)
    refuse_outside_links(model.origin, COMPANIONS)
    for name in ("config.json", "tokenizer_config.json"):
        path = model.origin / name
        for key, reason in FORBIDDEN_KEYS.items():
            if path.is_file() and read_json(path).get(key) is not None:
                raise InputError(
                    f"{path} {reason} ({key})", "use a model that transformers supports, in bf16, fp16 or fp32"
                )
    check_family(_architecture(model), model)
    check_sizes(model.origin / "config.json", model.config, model.tensors)
    for tensor in model.tensors.values():
        if tensor.dtype not in KINDS:
            raise InputError(
                f"{model}: {printable(tensor.name)} is {tensor.dtype}; only BF16, F16 and F32 can be merged",
                "convert the model to bf16 or fp32 first",
            )


def _architecture(model: Checkpoint) -> str:
    names = model.config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise InputError(f"{model.origin}/config.json does not name one architecture ({names!r})", "restore the file")
    return names[0]


def check_same_architecture(
    first: Checkpoint, other: Checkpoint, free: Collection[str] = (), allowed: Collection[str] | None = None
) -> tuple[ConfigDifference, ...]:
    """Require the same architecture, and the same value of every key that decides the function.

    Returns the differences that are allowed.

    free     keys that are not compared
    allowed  keys that may differ; None: the caller has no way to allow one
    Raises InputError.
    """
    names = _architecture(first), _architecture(other)
    kinds = [head_of(name) for name in names]
    if kinds[0] != kinds[1] and None not in kinds:
        raise InputError(f"{other} is {kinds[1]}, {first} is {kinds[0]}", ONE_KIND)
    if names[0] != names[1]:
        found = ConfigDifference("architectures", *names)
        raise InputError(f"architectures differs: {found.values(first, other)}", ONE_ARCHITECTURE)
    differences = config_differences(first.config, other.config, free)
    refused = [one for one in differences if one.key in SHAPES or not is_allowed(one.key, allowed or ())]
    if refused:
        worst, more = refused[0], [one.key for one in refused[1:]]
        also = f" (and {', '.join(map(printable, more))})" if more else ""
        hint = ONE_ARCHITECTURE
        if worst.key == "vocab_size":
            hint = "merge models of one vocabulary, or choose one: merge --tokenizer"
        elif allowed is not None and not any(one.key in SHAPES for one in refused):
            flags = " ".join(f"--allow-config {printable(one.key)}" for one in refused)
            hint += f", or keep the values of {first.role}: {flags}"
        key = "num_labels" if worst.key == "id2label" and isinstance(worst.left, int) else printable(worst.key)
        raise InputError(f"{key} differs: {worst.values(first, other)}{also}", hint)
    return differences


def check_same_tensors(first: Checkpoint, other: Checkpoint, resized: Collection[str] = ()) -> None:
    """Require the same names with the same shapes; the first dimension of those in `resized` is not compared."""
    for name in sorted(set(first.tensors) ^ set(other.tensors)):
        has, lacks = (first, other) if name in first.tensors else (other, first)
        missing = len(set(has.tensors) - set(lacks.tensors))
        more = f" and {missing - 1} more" if missing > 1 else ""
        raise InputError(f"{has} has {printable(name)}{more}, {lacks} does not", "merge models of one architecture")
    for name, tensor in first.tensors.items():
        shape = other.tensors[name].shape
        compared = 1 if name in resized else 0
        if shape[compared:] != tensor.shape[compared:]:
            raise InputError(
                f"{printable(name)} is {list(tensor.shape)} in {first}, {list(shape)} in {other}",
                "merge models of one architecture and one vocabulary",
            )


def check_same_tokenizer(first: Checkpoint, other: Checkpoint) -> None:
    """Require the same token for every id. Compared if both directories have the file."""
    difference = tokenizer_difference(first.origin, other.origin)
    if difference:
        raise InputError(
            f"the tokenizers of {first} and {other} differ: {difference}",
            "a token must have the same row of the embedding: choose a tokenizer with merge --tokenizer",
        )
