"""What a config.json says of the function that a checkpoint computes, and the first difference of two. Numpy-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gemma2.core.json_files import JsonMapping, JsonObject

__all__ = ["LM_HEAD", "ONE_KIND", "difference", "head_of", "stated"]

# Only these keys are compared: others differ between versions of transformers, and between a pre-trained model and its
# fine-tuned child (eos ids, cache, names).
KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_labels"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "tie_word_embeddings"),
    *("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "rms_norm_eps", "rope_theta"),
)
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
