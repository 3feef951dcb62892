"""A config.json with the defaults of its model type filled in, in one spelling: what transformers would make of it.

The defaults are those of transformers' configuration classes, as a table (config_defaults.json): transformers itself
would import torch, which a merge does without. Values that follow from others (kinds of layers, heads, rotary
embeddings) are derived here as the classes do; `tests/merging/inputs/test_config_keys.py` compares both, and its
command writes the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gemma2.core.json_files import JsonMapping, JsonObject

__all__ = ["filled", "is_tied"]

TABLE = Path(__file__).with_name("config_defaults.json")
# Older spellings of keys, of any model type.
OLD_NAMES = {"torch_dtype": "dtype"}
ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
LOCAL_THETA = "rope_local_base_freq"
TRAINED_LENGTH = "original_max_position_embeddings"


@cache
def _table() -> JsonObject:
    """Return model type -> defaults, other names of keys, theta and rotary share, configurations inside."""
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    return dict(found)


def is_tied(config: JsonMapping) -> bool:
    """Whether the output head is the embedding: as the configuration states, else as its model type has it."""
    stated = config.get("tie_word_embeddings")
    if isinstance(stated, bool):
        return stated
    return bool(_entry(config).get("defaults", {}).get("tie_word_embeddings"))


def filled(config: JsonMapping) -> JsonObject:
    """Return the configuration with its defaults; of an unknown model type only with its spelling changed."""
    entry = _entry(config)
    names = OLD_NAMES | dict(entry.get("names", {}))
    values: JsonObject = dict(entry.get("defaults", {}))
    values |= {names.get(key, key): value for key, value in config.items()}
    for key, kind in entry.get("parts", {}).items():
        part = values.get(key)
        values[key] = {"model_type": kind} | (part if isinstance(part, dict) else {})
    for key, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            values[key] = filled(value)
    labels = values.pop("id2label", None)
    values["id2label"] = labels if isinstance(labels, dict) else _labels(values.get("num_labels"))
    if entry:
        _derive(values, str(config.get("model_type")))
        if "rope_parameters" in values:
            values["rope_parameters"] = _rope(values, entry)
            for key in (*ROPE_KEYS, LOCAL_THETA):
                values.pop(key, None)
    return values


def _entry(config: JsonMapping) -> JsonObject:
    found = _table().get(str(config.get("model_type")))
    return found if isinstance(found, dict) else {}


def _labels(count: object) -> JsonObject:
    return {str(number): f"LABEL_{number}" for number in range(count if isinstance(count, int) else 2)}


def _whole(value: object) -> int:
    """Return a positive whole number; 1 for anything else, which is compared as it is."""
    return value if isinstance(value, int) and value > 0 else 1


def _derive(values: JsonObject, kind: str) -> None:
    """Fill in what follows from other keys."""
    heads, hidden = values.get("num_attention_heads"), _whole(values.get("hidden_size"))
    for key in ("num_key_value_heads", "num_kv_heads"):
        if key in values and values[key] is None:
            values[key] = heads
    if kind == "cohere2" or ("head_dim" in values and values["head_dim"] is None):
        values["head_dim"] = hidden // _whole(heads)
    if "ffn_hidden_size" in values and values["ffn_hidden_size"] is None:
        values["ffn_hidden_size"] = 4 * hidden
    if kind == "gemma" and values.get("hidden_act") == "gelu":
        values["hidden_act"] = "gelu_pytorch_tanh"
    if kind in ("qwen2", "qwen3") and not values.get("use_sliding_window"):
        values["sliding_window"] = None
    layers = range(_whole(values.get("num_hidden_layers")))
    if "no_rope_layers" in values and values["no_rope_layers"] is None:
        every = _whole(values.get("no_rope_layer_interval"))
        values["no_rope_layers"] = [int((layer + 1) % every != 0) for layer in layers]
    if "layer_types" in values and values["layer_types"] is None:
        values["layer_types"] = [
            "sliding_attention" if _slides(values, kind, layer) else "full_attention" for layer in layers
        ]


def _slides(values: JsonMapping, kind: str, layer: int) -> bool:
    """Whether a layer attends to a window only, where the configuration lists no kinds of layers."""
    if kind == "gemma2":
        return layer % 2 == 0
    if kind in ("gemma3_text", "cohere2"):
        pattern = values.get("sliding_window_pattern", values.get("_sliding_window_pattern"))
        return (layer + 1) % _whole(pattern if pattern is not None else 6 if kind == "gemma3_text" else 4) != 0
    if values.get("sliding_window") is None:
        return False
    if kind in ("qwen2", "qwen3"):
        return layer >= _count(values["max_window_layers"])
    listed = values.get("no_rope_layers")
    roped = not isinstance(listed, list) or layer >= len(listed) or bool(listed[layer])
    return bool(values.get("use_sliding_window")) and not roped


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _rope(values: JsonMapping, entry: JsonMapping) -> JsonObject:
    """Return the rotary embeddings in their newer spelling: one mapping, or one for each kind of layer."""
    defaults: Mapping[str, Any] = entry.get("rope") or {}
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    given = given if isinstance(given, dict) else {"rope_type": given}
    local = defaults.get("local")
    if local is not None:
        scaled = values.get("rope_scaling")
        given = (values.get("rope_parameters") or {}) if isinstance(scaled, dict) else given
        whole = {**(given.get("full_attention") or {}), **(scaled if isinstance(scaled, dict) else {})}
        window = given.get("sliding_attention") or {}
        theta = values.get("rope_theta", defaults["theta"])
        return {
            "full_attention": _one_rope(whole, theta, None, values),
            "sliding_attention": _one_rope(window, values.get(LOCAL_THETA, local), None, values),
        }
    own = "rotary_emb_base" if values.get("model_type") == "gpt_neox" else "rope_theta"
    theta = values.get(own, defaults.get("theta"))
    share = values.get("rotary_pct", values.get("partial_rotary_factor", defaults.get("share")))
    nested = {key: part for key, part in given.items() if isinstance(part, dict)}
    if nested:
        return {key: _one_rope(part, theta, share, values) for key, part in nested.items()}
    return _one_rope(given, theta, share, values)


def _one_rope(given: JsonMapping, theta: object, share: object, values: JsonMapping) -> JsonObject:
    found = {key: value for key, value in given.items() if key != "type"}
    kind = found.setdefault("rope_type", given.get("type", "default"))
    found.setdefault("rope_theta", theta)
    if share is not None:
        found.setdefault("partial_rotary_factor", share)
    if values.get("model_type") == "phi3" and kind in ("su", "yarn"):
        found["rope_type"] = "longrope"
    if kind in ("llama3", "yarn", "longrope", "su"):
        if values.get(TRAINED_LENGTH) is not None:
            found[TRAINED_LENGTH] = values[TRAINED_LENGTH]
        else:
            found.setdefault(TRAINED_LENGTH, values.get("max_position_embeddings"))
    return found
