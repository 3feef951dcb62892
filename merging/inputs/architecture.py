"""What a config.json says of the function that a checkpoint computes, and the first difference of two. Numpy-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.safetensors_header import Tensor, printable

from .config_defaults import filled

__all__ = ["LM_HEAD", "ONE_KIND", "check_sizes", "check_types", "classifies", "difference", "head_of", "stated"]

# Only these keys are compared: others differ between versions of transformers, and between a pre-trained model and its
# fine-tuned child (eos ids, cache, names).
KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_labels"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "tie_word_embeddings"),
    *("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "rms_norm_eps", "rope_theta"),
)
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
EMBEDDING, LAYER = "embed_tokens.weight", re.compile(r"^(?:model\.|language_model\.)*layers\.(\d{1,9})\.")
HEADS_OF = {"self_attn.q_proj.weight": "num_attention_heads", "self_attn.k_proj.weight": "num_key_value_heads"}
THREE = {"vocab_size", "hidden_size", "num_hidden_layers"}
LM_HEAD = "lm_head.weight"
HEADS = {"SequenceClassification": "a reward model", "CausalLM": "a policy"}
ONE_KIND = "merge policies with policies, and reward models with reward models"


def stated(config: JsonMapping) -> JsonObject:
    """The keys that decide the function, where the configuration states them."""
    inner = config.get("text_config")  # of a model with a vision tower
    whole = {**inner, **config} if isinstance(inner, dict) else config
    found = {key: _value(whole, key) for key in KEYS}
    return {key: value for key, value in found.items() if value is not None}


def _value(config: JsonMapping, key: str) -> object:
    """Return the value of a key of the configuration in the older or newer spelling of transformers."""
    nested = config.get("rope_parameters")
    if key == "rope_theta" and key not in config and isinstance(nested, dict):
        return nested.get(key)
    if key == "num_labels" and key not in config:
        labels = config.get("id2label")
        return len(labels) if isinstance(labels, dict) else None
    return config.get(key)


def difference(
    first: Mapping[str, object], other: Mapping[str, object], free: Collection[str] = ()
) -> tuple[str, object, object] | None:
    """(key, first value, other value) of the first key that both state differently; `free` ones are not compared."""
    for key in (*KEYS, *(key for key in first if key not in KEYS)):
        left, right = first.get(key), other.get(key)
        if key not in free and None not in (left, right) and left != right:
            return key, left, right
    return None


def head_of(architecture: str) -> str | None:
    """The kind of model in words, by the end of its architecture; None for another head."""
    return next((words for end, words in HEADS.items() if architecture.endswith(end)), None)


def check_types(path: Path, config: JsonMapping) -> None:
    """Raise InputError for a config.json at `path` whose sizes are not positive integers, or architectures not names.

    The libraries that read it report this in their own ways, without the file.
    """
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{path}: architectures is {printable(str(names))}, not a list of names", "restore the file")
    for key in SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{path}: {key} is {printable(str(value))}, not a positive integer", "restore the file")


def classifies(config: JsonMapping) -> bool:
    """Whether a configuration is that of a sequence classifier, as reward models are."""
    return any("SequenceClassification" in str(name) for name in config.get("architectures") or ())


def check_sizes(path: Path, config: JsonMapping, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for a config.json at `path` that states other sizes than the tensors have.

    The libraries that load such a model say so late, or take only some of its layers. Where it states two of three
    sizes, the third must not be left to a default that the tensors do not have: its key is damaged or misspelt.
    """
    said = stated(config)
    whole = stated(filled(config)) if len(THREE & said.keys()) == 2 else said
    for key, size, where in _sizes_of(tensors, said):
        if whole.get(key, size) != size:
            shown = f"{printable(str(whole[key]))}{'' if key in said else ' by default'}"
            raise InputError(
                f"{path}: {key} is {shown}, but {where}",
                "configuration and weights do not belong together; restore both",
            )


def _sizes_of(tensors: Mapping[str, Tensor], said: JsonMapping) -> Iterator[tuple[str, int, str]]:
    """Yield key, size, and where it is seen, for the sizes that the shapes of a decoder's tensors show."""
    layers = 0
    for name, tensor in tensors.items():
        layer, shape = LAYER.match(name), tensor.shape
        where = f"{printable(name)} is {list(shape)}"
        if len(shape) == 2 and name.endswith(EMBEDDING):
            yield "vocab_size", shape[0], where
            yield "hidden_size", shape[1], where
        if layer is None:
            continue
        layers = max(layers, int(layer[1]) + 1)
        kind = name[layer.end() :]
        if kind == "mlp.up_proj.weight" and "intermediate_size" in said:
            yield "intermediate_size", shape[0], where
        heads = HEADS_OF.get(kind)
        per_head = said.get("head_dim")
        if heads in said and type(per_head) is int and per_head > 0 and len(shape) == 2 and not shape[0] % per_head:
            yield str(heads), shape[0] // per_head, where
    if layers:
        yield "num_hidden_layers", layers, f"the tensors have {layers} layers"
