"""What is said of a difference: a setting with both values, a key of a configuration file, nothing that is not so."""

import json

import pytest
from text_model import write_text_model

from gemma2.core.json_files import write_json
from gemma2.posttrain.provenance.origin import changes, origin_of
from gemma2.posttrain.schemas import MergeConfig, SftConfig


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "init"):
        (tmp_path / name).mkdir()
        write_text_model(tmp_path / name, name)
        write_json(tmp_path / name / "config.json", {"final_logit_softcapping": 30.0, "hidden_size": 4})
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


def said(record, command, config, unknown=()):
    return [str(change) for change in changes(record, command, config, unknown)]


def test_a_changed_key_of_a_configuration_is_named_with_both_values(place):
    config = SftConfig(model="a", data=("rows.jsonl",))
    record = origin_of("sft", config, place / "out")
    write_json(place / "a" / "config.json", {"final_logit_softcapping": 8.0, "hidden_size": 4, "new": True})
    assert said(record, "sft", config) == [
        "final_logit_softcapping in config.json of model a (30.0 -> 8.0)",
        "new in config.json of model a (nothing -> true)",
    ]


def test_a_long_file_of_settings_is_named_without_its_values(place):
    config = SftConfig(model="a", data=("rows.jsonl",))
    write_json(place / "a" / "tokenizer_config.json", {"x": "y" * 9000})
    record = origin_of("sft", config, place / "out")
    assert len(json.dumps(record)) < 6000
    write_json(place / "a" / "tokenizer_config.json", {"x": "z" * 9000})
    assert said(record, "sft", config) == ["tokenizer_config.json of model a"]


def test_a_record_that_was_edited_is_a_difference_and_not_a_traceback(place):
    config = SftConfig(model="a", data=("rows.jsonl",))
    record = origin_of("sft", config, place / "out")
    for text in ("{", "", None, 5):
        record["parents"][0]["files"]["config.json"] = text
        assert said(record, "sft", config) == ["config.json of model a"]


@pytest.mark.parametrize("unknown", [{"models"}, {"base"}])
def test_a_merge_whose_models_are_not_made_yet_has_no_change_of_its_base(place, unknown):
    config = MergeConfig(method="slerp", models=("a", "b"), base="init")
    record = origin_of("merge slerp", config, place / "out")
    assert said(record, "merge slerp", config, unknown) == []
    assert said(record, "merge slerp", config.model_copy(update={"t": 0.3}), unknown) != []


@pytest.mark.parametrize("method", ["slerp", "linear", "ties", "liti", "passthrough"])
def test_the_hash_of_what_a_merge_would_make_is_that_of_its_manifest(place, method, tmp_path):
    from model_files import random_arrays, write_model

    from gemma2.core.outputs.manifest import read_manifest
    from gemma2.merging import merge
    from gemma2.posttrain.runs.commands import output_hash

    for number, name in enumerate(("x", "y", "z")):
        write_model(place / name, random_arrays(number))
    more = {"liti": {"models": ("x",), "base": "z", "eta": 0.5}, "passthrough": {"models": ("x",)}}
    config = MergeConfig(
        method=method, **more.get(method, {"models": ("x", "y")} | ({"base": "z"} if method == "ties" else {}))
    )
    merge(config.request(), out=place / "out")
    manifest = read_manifest(place / "out")
    assert output_hash(manifest) == output_hash(origin_of(f"merge {method}", config, place / "out"))
    assert said(manifest, f"merge {method}", config) == []
