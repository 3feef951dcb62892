"""The keys of two config.json that differ and decide what the models compute: every key that is not known harmless.

Compared after the defaults of the model type are filled in, nested keys by their path (`rope_parameters.factor`). Null
is a value. A key that a future version of transformers brings counts until it is on the list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gemma2.core.json_files import JsonMapping
from gemma2.core.outputs.safetensors_header import printable

from .config_defaults import filled

__all__ = ["HARMLESS", "SHAPES", "TIE", "ConfigDifference", "config_differences", "is_allowed"]

TIE = "tie_word_embeddings"
ABSENT = "(absent)"
NAMES, TRAINING, DECODING = "a name or a version", "has an effect in training only", "a default of decoding"
SHOWN, TOKENS = (
    "decides what a call returns, not what it computes",
    "an id of a token: compared as a token, with a warning",
)
# Key -> the reason why models that differ in it still compute the same function of their weights. At any depth.
HARMLESS = {
    **dict.fromkeys(("_name_or_path", "name_or_path", "transformers_version", "model_name", "_commit_hash"), NAMES),
    **dict.fromkeys(("_from_model_config", "finetuning_task", "tokenizer_class", "unsloth_version"), NAMES),
    **dict.fromkeys(("unsloth_fixed", "unsloth_tracked"), NAMES),
    "architectures": "compared on its own",
    "auto_map": "refused on its own",
    "label2id": "the inverse of id2label, which is compared",
    "num_labels": "the size of id2label, which is compared",
    "dtype": "every tensor states its own, compared with a warning",
    "problem_type": "chooses the loss in training",
    "tie_encoder_decoder": "has an effect on encoder-decoders only, which are refused",
    **dict.fromkeys(
        ("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"), "an implementation"
    ),
    **dict.fromkeys(
        ("_attn_implementation_internal", "_experts_implementation", "use_flash_attn"), "an implementation"
    ),
    **dict.fromkeys(("pretraining_tp", "chunk_size_feed_forward", "torchscript"), "the order of a computation"),
    **dict.fromkeys(("use_cache", "cache_implementation", "gradient_checkpointing"), "what is kept in memory"),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"), SHOWN),
    **dict.fromkeys(("output_router_logits", "summary_first_dropout", "router_jitter_noise"), TRAINING),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), TRAINING),
    **dict.fromkeys(("classifier_dropout", "embedding_dropout", "residual_dropout", "dropout"), TRAINING),
    **dict.fromkeys(("initializer_range", "initializer_factor", "router_aux_loss_coef"), TRAINING),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"), TOKENS),
    **dict.fromkeys(("cls_token_id", "mask_token_id", "decoder_start_token_id"), TOKENS),
    **dict.fromkeys(
        ("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"), DECODING
    ),
    **dict.fromkeys(("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"), DECODING),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"), DECODING),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "num_return_sequences"), DECODING),
    **dict.fromkeys(("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"), DECODING),
    **dict.fromkeys(("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"), DECODING),
    **dict.fromkeys(("begin_suppress_tokens", "task_specific_params", "prefix"), DECODING),
}
# Key -> the key that transformers turns it into, which is compared; harmless where the model type has that key.
DERIVED = {
    **dict.fromkeys(("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"), "layer_types"),
    "use_sliding_window": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}
# The longest input. With these rotary embeddings it decides frequencies; with others it is a promise, with a warning.
LENGTH, STRETCHED = "max_position_embeddings", ("dynamic", "yarn", "longrope")
# These decide shapes or the kind of model: no flag makes them fit. In the order in which they are reported.
SHAPES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "id2label"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


@dataclass(frozen=True)
class ConfigDifference:
    """A key (its path, with dots) and its value in two models."""

    key: str
    left: object
    right: object

    def values(self, first: object, other: object) -> str:
        """Return both values with the models that have them."""
        return f"{_shown(self.left)} in {first}, {_shown(self.right)} in {other}"


def config_differences(
    first: JsonMapping, other: JsonMapping, free: Collection[str] = ()
) -> tuple[ConfigDifference, ...]:
    """Return the keys that decide the function and differ, those of shapes first. `free` ones are not compared.

    The tie of the head (TIE) is compared by `output_heads`.
    """
    if first == other:
        return ()
    left, right = filled(first), filled(other)
    if "num_hidden_layers" in free:  # layers are stacked: the output lists the kind of each
        free = {*free, "layer_types"}
    found = list(_differing(left, right, frozenset(free) | {TIE}))
    order = {key: number for number, key in enumerate(SHAPES)}
    return tuple(sorted(found, key=lambda one: (order.get(one.key, len(order)), one.key)))


def is_allowed(key: str, allowed: Collection[str]) -> bool:
    """Whether a key, or one above it, is among those that a user accepts; "*" is every key."""
    parts = key.split(".")
    return "*" in allowed or any(".".join(parts[:end]) in allowed for end in range(1, len(parts) + 1))


def _differing(
    left: JsonMapping, right: JsonMapping, free: frozenset[str], path: str = ""
) -> Iterator[ConfigDifference]:
    for key in sorted(left.keys() | right.keys()):
        whole = f"{path}{key}"
        if whole in free or key in HARMLESS or _is_derived(key, left, right):
            continue
        ours, theirs = left.get(key, ABSENT), right.get(key, ABSENT)
        if key == "id2label":
            ours, theirs = _labels(ours), _labels(theirs)
            ours, theirs = (ours, theirs) if _named(ours) and _named(theirs) else (_size(ours), _size(theirs))
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differing(ours, theirs, free, f"{whole}.")
        elif ours != theirs and {_absent(ours), _absent(theirs)} != {True}:
            yield ConfigDifference(whole, ours, theirs)


def _absent(value: object) -> bool:
    """Whether a value is missing. Null of a key without a default is missing too: a class that lacks it reads None."""
    return value == ABSENT or value is None


def _is_derived(key: str, left: JsonMapping, right: JsonMapping) -> bool:
    if key == LENGTH:
        return not any(kind in STRETCHED for config in (left, right) for kind in _rope_types(config))
    target = DERIVED.get(key)
    return target is not None and target in left and target in right


def _rope_types(config: JsonMapping) -> Iterator[object]:
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        yield rope.get("rope_type")
        yield from (part.get("rope_type") for part in rope.values() if isinstance(part, dict))


def _labels(value: object) -> object:
    """Return names of labels by number; of one label, none: it has no order."""
    if not isinstance(value, dict) or len(value) < 2:
        return _size(value)
    return [value[key] for key in sorted(value, key=str)]


def _named(labels: object) -> bool:
    """Whether labels have other names than the defaults."""
    return isinstance(labels, list) and not all(str(name).startswith("LABEL_") for name in labels)


def _size(labels: object) -> object:
    return len(labels) if isinstance(labels, dict | list) else labels


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return printable(text if len(text) <= 80 else f"{text[:77]}...")
