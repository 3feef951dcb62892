"""Checks that model directories can be merged: configuration, tensors, tokenizers. Reads no tensor data.

Every refusal names the key, both values and both directories. Nothing is truncated, renamed or dropped to make
models fit.
"""

from __future__ import annotations

from collections.abc import Collection

from gemma2.core.errors import InputError
from gemma2.core.json_files import read_json
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.outputs.tokenizer_ids import tokenizer_difference
from gemma2.merging.kernels.dtypes import KINDS

from .architecture import LM_HEAD, ONE_KIND, difference, head_of, stated
from .checkpoint import Checkpoint
from .families import check_family

__all__ = [
    "check_model",
    "check_same_architecture",
    "check_same_tensors",
    "check_same_tokenizer",
    "tied_copies",
]

# Keys that require code from the model, or weights that are not plain numbers.
FORBIDDEN_KEYS = {
    "auto_map": "requires its own code",
    "custom_pipelines": "requires its own code",
    "quantization_config": "has quantised weights",
}
EMBEDDING = "embed_tokens.weight"


def check_model(model: Checkpoint) -> None:
    """Refuse a model that cannot be merged, or not safely. Raises InputError."""
    for name in ("config.json", "tokenizer_config.json"):
        path = model.origin / name
        for key, reason in FORBIDDEN_KEYS.items():
            if path.is_file() and read_json(path).get(key) is not None:
                raise InputError(
                    f"{path} {reason} ({key})", "use a model that transformers supports, in bf16, fp16 or fp32"
                )
    check_family(_architecture(model), model)
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


def check_same_architecture(first: Checkpoint, other: Checkpoint, free: Collection[str] = ()) -> None:
    """Require the same architecture, and the same value of every key that decides the function, where both state it.

    The keys in `free` are not compared. Raises InputError.
    """
    names = _architecture(first), _architecture(other)
    kinds = [head_of(name) for name in names]
    if kinds[0] != kinds[1] and None not in kinds:
        raise InputError(f"{other} is {kinds[1]}, {first} is {kinds[0]}", ONE_KIND)
    found = (
        ("architectures", *names)
        if names[0] != names[1]
        else difference(stated(first.config), stated(other.config), free)
    )
    if found is not None:
        key, left, right = found
        hint = "merge models of one architecture"
        if key == "vocab_size":
            hint = "merge models of one vocabulary, or choose one: merge --tokenizer"
        raise InputError(f"{key} differs: {printable(str(left))} in {first}, {printable(str(right))} in {other}", hint)


def check_same_tensors(first: Checkpoint, other: Checkpoint, resized: Collection[str] = ()) -> None:
    """Require the same names with the same shapes; the first dimension of those in `resized` is not compared."""
    for name in sorted(set(first.tensors) ^ set(other.tensors)):
        has, lacks = (first, other) if name in first.tensors else (other, first)
        missing = len(set(has.tensors) - set(lacks.tensors))
        if name == LM_HEAD:
            raise InputError(
                f"{has} has its own {LM_HEAD}, {lacks} ties it to the embedding",
                "save both the same way before merging",
            )
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


def tied_copies(model: Checkpoint) -> dict[str, str]:
    """Return stored copies of tensors that the configuration ties: {copy: original}, merged and written once."""
    if LM_HEAD not in model.tensors or model.config.get("tie_word_embeddings") is not True:
        return {}
    embedding = next((name for name in model.tensors if name.endswith(EMBEDDING)), None)
    return {LM_HEAD: embedding} if embedding else {}


def check_same_tokenizer(first: Checkpoint, other: Checkpoint) -> None:
    """Require the same token for every id. Compared if both directories have the file."""
    difference = tokenizer_difference(first.origin, other.origin)
    if difference:
        raise InputError(
            f"the tokenizers of {first} and {other} differ: {difference}",
            "a token must have the same row of the embedding: choose a tokenizer with merge --tokenizer",
        )
