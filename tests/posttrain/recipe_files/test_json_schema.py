"""`gemma2 config schema`: what the schemas of settings files accept and refuse, and what they tell an editor."""

import pytest
from schema_rules import wrongs

from gemma2.configs import recipes
from gemma2.core.errors import UsageError
from gemma2.core.yaml_files import read_documents
from gemma2.merging.methods.option import OPTIONS
from gemma2.posttrain.recipe_files.json_schema import json_schema
from gemma2.posttrain.recipe_files.schema_index import FILE_KINDS, commands_with_settings
from gemma2.posttrain.recipe_files.settings_check import check_file


@pytest.mark.parametrize("name", recipes())
def test_what_comes_with_the_package_fits_the_schema_of_its_kind(name):
    path = recipes()[name]
    schema = json_schema(check_file(path).kind)
    assert list(wrongs(schema, read_documents(path)[0])) == []


@pytest.mark.parametrize("command", commands_with_settings())
def test_every_key_of_a_command_has_its_meaning_and_no_other_key_fits(command):
    schema, fields = json_schema(command), commands_with_settings()[command].model_fields
    assert set(schema["properties"]) - {"lambda"} == set(fields)
    assert [key for key, one in schema["properties"].items() if not one.get("description")] == []
    assert [*wrongs(schema, {"no_such_key": 1})] and not [*wrongs(schema, {})]
    for key, field in fields.items():
        assert field.is_required() or "default" in schema["properties"][key], key


def test_bounds_and_choices_are_those_of_the_command():
    schema = json_schema("sft")
    for right in (
        {"epochs": 0.5},
        {"data": "a.jsonl"},
        {"data": ["a.jsonl"]},
        {"lora_alpha": None},
        {"columns": {"a": "b"}},
    ):
        assert [*wrongs(schema, right)] == [], right
    for wrong in ({"epochs": 0}, {"data": 3}, {"keep": "first"}, {"max_length": 7}, {"packing": "yes"}):
        assert [*wrongs(schema, wrong)] != [], wrong
    assert schema["properties"]["max_length"]["description"].endswith("tokens")


def test_a_stage_has_the_options_of_its_command_and_references_fit_anywhere():
    schema = json_schema("pipeline")

    def found(command: str, options: str) -> list[str]:
        return [*wrongs(schema, {"stages": {"a": {"command": command, "options": options}}})]

    assert found("sft", {"epochs": 1, "seed": "${vars.seed}", "data": ["${b.out}"]}) == []
    assert found("merge slerp", {"models": ["a", "b"], "t": 0.3, "base": "c"}) == []
    assert found("sft", {"epoch": 1}) and found("rlhf", {"epochs": 1}) and found("stf", {})
    assert found("sft", {"epochs": "many"})


def test_a_file_of_merges_is_one_merge_or_steps():
    schema = json_schema("merge")
    one = {"method": "slerp", "models": ["a", {"model": "b"}], "base": "c", "t": [0, 0.3, 1], "dtype": "bfloat16"}
    assert [*wrongs(schema, one)] == [] == [*wrongs(schema, {"steps": {"x": one, "y": one}})]
    rules = [{"match": "mlp", "value": 0.2}, 0.5]
    assert [*wrongs(schema, one | {"t": rules})] == []
    for wrong in ({"method": "slrp"}, {"t": "high"}, {"modles": []}, {"dtype": "int8"}, {"seed": 0.5}):
        assert [*wrongs(schema, one | wrong)] != [], wrong
    assert set(OPTIONS) <= set(schema["$defs"]["merge"]["properties"])


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(UsageError, match="did you mean 'sft'"):
        json_schema("stf")
    assert all(json_schema(name)["title"] for name in FILE_KINDS)
