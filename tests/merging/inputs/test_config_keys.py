"""Every key of every supported configuration: changed alone it is refused, or on the list of harmless ones.

`PYTHONPATH=tests:tests/merging/inputs python tests/merging/inputs/test_config_keys.py` writes the table of defaults.
"""

import json
from dataclasses import MISSING, fields

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gemma2.merging.inputs.config_defaults import TABLE, filled, is_tied
from gemma2.merging.inputs.config_keys import DERIVED, HARMLESS, LENGTH, TIE, config_differences

KINDS = (
    *("gemma", "gemma2", "gemma3", "gemma3_text", "llama", "mistral", "mixtral", "qwen2", "qwen3", "phi", "phi3"),
    *("olmo", "olmo2", "cohere", "cohere2", "granite", "smollm3", "stablelm", "starcoder2", "gpt2", "gpt_neox"),
    *("falcon", "helium", "siglip_vision_model"),
)
PARTS = {"gemma3": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"}}
SMALL = {
    **{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4},
    **{"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def of_transformers(kind, **changes):
    """What transformers makes of a configuration, as JSON has it."""
    return json.loads(CONFIG_MAPPING[kind].from_dict({"model_type": kind} | changes).to_json_string(use_diff=False))


def default_of(field):
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return None if value is MISSING else value


def made_table():
    """The table of defaults, from the classes of the installed transformers."""
    table = {}
    for kind in KINDS:
        cls = CONFIG_MAPPING[kind]
        skipped = set(HARMLESS) | {"id2label", "model_type", *PARTS.get(kind, ())}
        entry = {"defaults": {f.name: default_of(f) for f in fields(cls) if f.name not in skipped}}
        entry["names"] = {old: new for old, new in cls.attribute_map.items() if new in entry["defaults"]}
        rope = of_transformers(kind).get("rope_parameters")
        if kind == "gemma3_text":
            entry["rope"] = {part: rope[layers]["rope_theta"] for part, layers in
                             (("theta", "full_attention"), ("local", "sliding_attention"))}  # fmt: skip
        elif rope:
            entry["rope"] = {"theta": rope["rope_theta"], "share": rope.get("partial_rotary_factor")}
        table[kind] = {key: value for key, value in (entry | {"parts": PARTS.get(kind)}).items() if value}
    return table


def text_of(table):
    rows = [f"{json.dumps(kind)}: {json.dumps(entry)}" for kind, entry in table.items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def test_the_table_of_defaults_is_that_of_the_installed_transformers():
    assert json.loads(TABLE.read_text()) == json.loads(json.dumps(made_table()))


def deciding(values):
    """The part of a filled configuration that is compared."""
    left_out = {*HARMLESS, *DERIVED, "id2label", "type"}  # "type" is the old name of rope_type
    return {
        key: deciding(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in left_out
    }


def small(kind):
    if kind == "gemma3":
        return {"text_config": small("gemma3_text") | {"model_type": "gemma3_text"}}
    spelt = {new: old for new, old in CONFIG_MAPPING[kind].attribute_map.items()}
    known = {field.name for field in fields(CONFIG_MAPPING[kind])}
    renamed = {spelt.get(key, key): value for key, value in SMALL.items()}
    return {key: value for key, value in renamed.items() if key in known}


SPELLINGS = [
    {},
    {"rope_theta": 5000.0, "rotary_emb_base": 5000.0},
    {"rope_theta": 5000.0, "rotary_emb_base": 5000.0, "rope_scaling": {"type": "linear", "factor": 8.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
    {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 2},
    {"num_key_value_heads": 2},
    {"sliding_window_pattern": 3},
    {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", SPELLINGS, ids=lambda changes: " ".join(changes) or "defaults")
def test_the_filled_configuration_is_what_transformers_makes_of_it(kind, changes):
    nested = kind in ("gemma3_text", "phi3", "gpt2", "siglip_vision_model")  # or longrope only, or none
    if (nested and {"rope_parameters", "rope_scaling"} & changes.keys()) or kind == "gemma3":
        changes = {}
    config = {"model_type": kind, **small(kind), **changes}
    expected = deciding(of_transformers(**{"kind": kind} | {k: v for k, v in config.items() if k != "model_type"}))
    found = deciding(filled(config))
    if expected.get("head_dim", 0) is None:  # filled in by the model's code there, and here
        expected["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if kind != "gpt_neox":
        expected.pop("rotary_emb_base", None)
    assert {key: found.get(key) for key in expected if key != "rope_theta"} == {
        key: value for key, value in expected.items() if key != "rope_theta"
    }


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return f"{value}_2"
    if isinstance(value, list):
        return [*value[1:], "another"]
    return 7


def without_heads(values):
    """Compared values; a head_dim of null is filled in by the code of the model."""
    return {key: value for key, value in deciding(values).items() if key != "head_dim"}


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("id2label", "label2id"):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def put(values, path, value):
    inner = values.get(path[0])
    return values | {path[0]: value if len(path) == 1 else put(inner, path[1:], value)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "siglip_vision_model"])
def test_each_key_changed_alone_is_a_difference_or_on_the_list_of_harmless_ones(kind):
    whole = of_transformers(kind, **small(kind))
    for path, value in leaves(whole):
        for other in (changed(value), None):
            harmless = any(part in HARMLESS or part in DERIVED or part == LENGTH for part in path) or path == (TIE,)
            if path[-1] == "id2label" or other == value:
                continue
            found = config_differences(whole, put(whole, path, other))
            names = [one.key for one in found]
            if not names and not harmless and not isinstance(whole.get("text_config"), dict):  # null: derived anew
                try:
                    made = of_transformers(kind, **put(whole, path, other))
                except StrictDataclassError:  # not a configuration of this kind
                    continue
                assert without_heads(made) == without_heads(whole), (path, value, other)
                continue
            if not names and other is None and path[-1] in ("layer_types", "num_key_value_heads", "head_dim"):
                continue
            assert bool(names) != harmless, (path, value, other, names)
            assert harmless or ".".join(path) in names, (path, value, other, names)


def test_every_harmless_key_has_a_reason():
    assert all(len(reason) > 8 for reason in HARMLESS.values())


CASES = {
    "rope type": ({}, {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters.factor"),
    "older spelling": ({"rope_theta": 10000.0}, {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_parameters"),
    "activation": ({}, {"hidden_activation": "gelu"}, "hidden_activation"),
    "layers": ({}, {"layer_types": ["full_attention"] * 26}, "layer_types"),
    "bias": ({}, {"attention_bias": True}, "attention_bias"),
    "null is a value": ({}, {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    "null window": ({"sliding_window": 4096}, {"sliding_window": None}, "sliding_window"),
    "an unknown key": ({}, {"future_switch": True}, "future_switch"),
    "labels": ({"id2label": {"0": "bad", "1": "good"}}, {"id2label": {"0": "good", "1": "bad"}}, "id2label"),
    "number of labels": ({"num_labels": 1}, {"num_labels": 3}, "id2label"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_used_to_merge_in_silence_is_a_difference(case):
    left, right, key = CASES[case]
    found = [one.key for one in config_differences({"model_type": "gemma2"} | left, {"model_type": "gemma2"} | right)]
    assert any(one.startswith(key) for one in found)


@pytest.mark.parametrize(
    ("kind", "differs"), [("yarn", True), ("dynamic", True), ("linear", False), ("default", False)]
)
def test_the_longest_input_counts_where_it_decides_frequencies(kind, differs):
    def config(length):
        rope = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 64}
        return {"model_type": "gemma2", "rope_parameters": rope, LENGTH: length}

    assert bool(config_differences(config(128), config(256))) == differs


@pytest.mark.parametrize("key", sorted(DERIVED))
def test_a_key_of_a_model_type_that_is_not_known_counts_as_it_is(key):
    (found,) = config_differences({"model_type": "new", key: 1}, {"model_type": "new", key: 2})
    assert found.key == key


EQUAL = {
    "stated default": ({}, {"attn_logit_softcapping": 50.0, "sliding_window": 4096}),
    "both spellings of rope": ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_type": "default"}}),
    "versions and ids": ({"torch_dtype": "float32"}, {"transformers_version": "4.42", "eos_token_id": [1, 107]}),
    "one label by any name": ({"id2label": {"0": "reward"}}, {"num_labels": 1}),
    "listed kinds of layers": ({"num_hidden_layers": 2}, {"layer_types": ["sliding_attention", "full_attention"],
                                                           "num_hidden_layers": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", EQUAL)
def test_the_same_function_in_another_spelling_is_no_difference(case):
    left, right = EQUAL[case]
    assert config_differences({"model_type": "gemma2"} | left, {"model_type": "gemma2"} | right) == ()


def test_thetas_of_gemma_3_are_compared_for_each_kind_of_layer():
    old = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 10000.0}
    parts = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 10000.0}}
    assert config_differences(old, {"model_type": "gemma3_text", "rope_parameters": parts}) == ()
    parts["sliding_attention"] = {"rope_theta": 5000.0}
    (found,) = config_differences(old, {"model_type": "gemma3_text", "rope_parameters": parts})
    assert found.key == "rope_parameters.sliding_attention.rope_theta"
    assert (found.left, found.right) == (10000.0, 5000.0)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_an_absent_tie_is_that_of_the_model_type(kind):
    assert is_tied({"model_type": kind}) == of_transformers(kind)[TIE]
    assert is_tied({"model_type": kind, TIE: not of_transformers(kind)[TIE]}) != of_transformers(kind)[TIE]


if __name__ == "__main__":
    TABLE.write_text(text_of(made_table()), encoding="utf-8")
