"""A merge as a stage says all that a merge file says, in the same words, and is refused for the same reasons."""

import pytest

from gemma2.core.errors import UsageError
from gemma2.core.yaml_files import to_yaml
from gemma2.merging.methods.option import OPTIONS
from gemma2.merging.methods.table import METHODS
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.posttrain.schemas import MergeConfig
from gemma2.posttrain.schemas.config import resolve

PAIR = {"method": "slerp", "models": ["a", "b"], "base": "c"}
SAYINGS = [
    {
        "method": "linear",
        "models": ["a", "b"],
        "allow_config": ["rope_parameters"],
        "chat_template": 2,
        "generation_config": 1,
    },
    PAIR | {"t": 0.3},
    PAIR | {"t": [0, 0.3, 1]},
    PAIR | {"t": {"layers": [0, 0.3, 1]}},
    PAIR | {"t": [{"match": "self_attn", "layers": [0, 0.5, 1]}, {"match": "mlp", "value": 0.3}, 0.5]},
    PAIR | {"method": "ties", "weights": [1, {"layers": [0, 1]}], "density": 0.3, "granularity": "tensor"},
    PAIR | {"method": "dare", "seed": 3, "rescale": False, "density": [0.5, 0.25], "dtype": "float16"},
    PAIR | {"method": "warp", "eta": [0.1, 0.3]},
    {"method": "ema", "models": ["a", "b"], "decay": 0.0},
    {"method": "ema", "models": ["a", "b"], "uniform": True},
    PAIR | {"slices": [{"sources": [{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [1, 3]}], "t": 0.1}]},
]


@pytest.mark.parametrize("saying", SAYINGS, ids=str)
def test_a_stage_asks_for_what_a_file_with_the_same_keys_asks_for(saying, tmp_path):
    (tmp_path / "merge.yaml").write_text(to_yaml(saying))
    (step,) = read_recipe(tmp_path / "merge.yaml").steps
    assert resolve(MergeConfig, flags=saying).request() == step.request


@pytest.mark.parametrize("saying", SAYINGS, ids=str)
def test_a_stage_is_the_same_after_its_configuration_was_written_and_read(saying, tmp_path):
    config = resolve(MergeConfig, flags=saying)
    (tmp_path / "again.yaml").write_text(to_yaml(config.model_dump(mode="json")))
    assert resolve(MergeConfig, file=tmp_path / "again.yaml") == config


def test_a_stage_has_a_field_for_every_option_and_no_other():
    common = {"method", "models", "base", "granularity", "tokenizer", "dtype", "slices", "allow_config"}
    common |= {"chat_template", "generation_config", "special_tokens"}
    assert MergeConfig.model_fields.keys() == common | OPTIONS.keys()
    assert {option.name for method in METHODS.values() for option in method.options} == OPTIONS.keys()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"t": "fast"}, "--t 'fast': t is 'fast', not a number; give a number"),
        ({"t": {"layer": [0, 1]}}, "unknown key 't.layer'; did you mean 'layers'?"),
        ({"t": 0.5, "tt": 1}, "unknown key 'tt'; did you mean 't'?"),
        ({"method": "slerpp"}, "--method 'slerpp' is not a merge method; did you mean 'slerp'?"),
        ({"method": "ema", "base": None}, "merge ema needs --decay or --uniform, and not both"),
        ({"slices": [{"sources": [{"model": "x", "layers": [0, 1]}]}]}, "x is neither one of the models nor the base"),
    ],
    ids=str,
)
def test_what_a_stage_cannot_mean_is_named(wrong, said):
    with pytest.raises(UsageError) as caught:
        resolve(MergeConfig, flags=PAIR | wrong)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_refuses_every_option_that_is_not_its_own(name):
    """Otherwise a number would be accepted and never read."""
    method = METHODS[name]
    count = method.models[0]
    given = {"base": "c"} if method.base != "none" else {}
    given |= {method.one_of[0]: 0.5} if method.one_of else {}
    values = {"switch": True, "integer": 7, "number": 0.25}
    for option in OPTIONS.values():
        if option not in method.options:
            config = {"method": name, "models": ["a", "b"][:count], **given, option.name: values[option.kind]}
            with pytest.raises(UsageError, match=rf"--{option.name}"):
                resolve(MergeConfig, flags=config).recorded()
