"""A setting that would be ignored is refused in one line, whose fix leads to a configuration."""

import re

import pytest

from gemma2.core.errors import UsageError
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import (
    DistillConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    ParetoConfig,
    RewardConfig,
    RlhfConfig,
    SftConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.schemas.filter import READ_BY

PROMPTS = {"prompts": "p"}
BASES = {
    GenerateConfig: {"teacher": "t", **PROMPTS},
    SftConfig: {"model": "m", "data": ["d"]},
    RewardConfig: {"model": "m", "data": "d"},
    RlhfConfig: {"policy": "m", "reward": ["r"], **PROMPTS},
    WarpConfig: {"sft": "m", "reward": ["r"], "heldout": "h", **PROMPTS},
    DistillConfig: {"model": "m", "teacher": "t", **PROMPTS},
    FilterConfig: {"data": "d"},
    ParetoConfig: {"sft": "s", "policies": ["b"], "reward": ["r"], **PROMPTS},
}
LORA = [{"lora_alpha": 8}, {"lora_dropout": 0.1}, {"lora_targets": ["q_proj"]}]
SERVER = [
    {"base_url": "http://a/v1"}, {"api_key_env": "KEY"}, {"concurrency": 2}, {"timeout": 9}, {"retries": 1},
    {"logprobs": True}, {"request": {"x": 1}}, {"price_in": 1, "price_out": 1},
]  # fmt: skip
# What is given, and then what the advice says to add.
ALONE = [
    *((GenerateConfig, one, {"engine": "openai"}) for one in SERVER),
    *((GenerateConfig, one, {"reward": ["r"]}) for one in ({"reward_clip": 1}, {"length_penalty": 0.1})),
    (GenerateConfig, {"missing_eos_penalty": 1}, {"reward_fn": ["a:b"]}),
    (GenerateConfig, {"user_instruction": "ask"}, {"turns": 2}),
    *((kind, one, {"lora_rank": 4}) for kind in (SftConfig, RewardConfig, DistillConfig) for one in LORA),
    *((kind, one, {"lora_rank": 4}) for kind in (RlhfConfig, WarpConfig) for one in LORA if "lora_dropout" not in one),
    *((kind, {"mu": 0.1, "anchor": anchor}, {"anchor": "ema"}) for kind in (RlhfConfig, WarpConfig)
      for anchor in ("none", "sft")),
    (ParetoConfig, {"etas": [0, 1]}, {"merged": "m"}),
    (DistillConfig, {"max_length": 64}, {"data": "d"}),
    (DistillConfig, {"eval_fraction": 0.2}, {"data": "d"}),
    (SftConfig, {"eval_every": 5, "eval_fraction": 0}, {"eval_fraction": 0.1}),
    (SftConfig, {"eval_every": 5, "eval_fraction": 0}, {"eval_data": "e"}),
    (FilterConfig, {"filters": ["empty"], "min_words": 3}, {"filters": ["empty", "length"]}),
    (FilterConfig, {"skip": ["contaminated"], "decontaminate": ["x"]}, {"skip": []}),
    (FilterConfig, {"skip": ["unsafe"], "unsafe_words": ["slurs"]}, {"skip": []}),
    (FilterConfig, {"skip": ["refusal"], "max_refusal_share": 0.1}, {"skip": []}),
    (FilterConfig, {"filters": ["language"], "language": ["en"], "near_threshold": 0.5}, {"filters": []}),
    (FilterConfig, {"unsafe_terms": 2}, {"unsafe_words": ["general"]}),
    (FilterConfig, {"safety_threshold": 0.9}, {"safety_model": "s"}),
    (FilterConfig, {"language_confidence": 0.5}, {"language": ["en"]}),
    (FilterConfig, {"decontaminate_ngram": 5}, {"decontaminate": ["x"]}),
]  # fmt: skip


@pytest.mark.parametrize("schema, given, added", ALONE)
def test_a_setting_without_an_effect_is_refused_and_the_advice_is_accepted(schema, given, added):
    with pytest.raises(UsageError, match=r"^--[a-z-]+ has no effect .+; .+drop --[a-z-]+$") as caught:
        resolve(schema, flags=BASES[schema] | given)
    flag = re.match(r"--([a-z-]+)", caught.value.what)[1].replace("-", "_")
    assert flag in given and caught.value.hint.endswith(f"drop --{flag.replace('_', '-')}")
    resolve(schema, flags=BASES[schema] | given | added)
    dropped = {key: value for key, value in given.items() if not key.startswith(flag.partition("_")[0])}
    resolve(schema, flags=BASES[schema] | dropped)


@pytest.mark.parametrize("schema, given, added", ALONE)
def test_a_default_that_is_spelt_out_is_not_an_order(schema, given, added):
    """The configuration that an output records names every field; it must be repeatable."""
    recorded = resolve(schema, flags=BASES[schema]).recorded()
    assert resolve(schema, flags=recorded).recorded() == recorded


def test_every_setting_of_one_filter_is_held_against_the_filters_that_run():
    """Its description names the filter in front; `batch_size` belongs to a model, not to a filter alone."""
    names = set(COMMANDS["filter"].schema.model_fields["skip"].annotation.__args__[0].__args__)
    for name, field in FilterConfig.model_fields.items():
        readers = tuple(part for part in field.description.partition(":")[0].split(", ") if part in names)
        if readers and name != "batch_size":
            assert READ_BY[name] == readers, name


@pytest.mark.parametrize("name", ["length", "language", "disclaimer", "unsafe", "contaminated", "refusal"])
def test_a_filter_that_is_asked_for_without_its_settings_is_refused_by_its_configuration(name):
    with pytest.raises(UsageError, match=rf"^--filters {name} does nothing by itself; give --"):
        resolve(FilterConfig, flags={"data": "d", "filters": [name]})


def test_an_evaluation_keeps_its_penalties():
    """Only generate can do without a reward; others refuse that by themselves."""
    assert resolve(EvalConfig, flags={"model": "m", "sft": "s", "reward": ["r"], "length_penalty": 0.1, **PROMPTS})
