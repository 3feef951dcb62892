"""Every path that a command can be given is an input of its record."""

from pathlib import Path

import pytest
from text_model import write_text_model

from gemma2.core.json_files import write_json
from gemma2.posttrain.provenance.named_inputs import KIND_OF_OPTION, named_inputs, names_a_path
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import ConvertConfig, GenerateConfig, MergeConfig, PairsConfig, ParetoConfig, SftConfig


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_takes_a_path_has_a_kind(command):
    fields = COMMANDS[command].schema.model_fields
    paths = {name for name, field in fields.items() if names_a_path(field.annotation)}
    assert paths <= KIND_OF_OPTION.keys()


def test_no_kind_is_of_an_option_that_no_command_has():
    assert KIND_OF_OPTION.keys() <= {name for command in COMMANDS.values() for name in command.schema.model_fields}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "init"):
        (tmp_path / name).mkdir()
        write_text_model(tmp_path / name, name)
        write_json(tmp_path / name / "config.json", {})
    for name in ("one.jsonl", "two.jsonl", "prompt.txt"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def named(config):
    return [(one.role, str(one.path), one.is_model) for one in named_inputs(config)]


def test_inputs_come_in_the_order_of_options_and_of_their_values(place):
    config = SftConfig(model=Path("a"), data=(Path("two.jsonl"), Path("one.jsonl")), eval_data=Path("one.jsonl"))
    assert named(config) == [
        ("model", "a", True),
        ("data", "two.jsonl", False),
        ("data", "one.jsonl", False),
        ("eval_data", "one.jsonl", False),
    ]
    assert [one.option for one in named_inputs(config, {"data"})] == ["model", "eval_data"]


def test_a_teacher_on_a_server_is_a_name_and_a_judge_is_a_model_where_it_is_a_directory(place):
    server = GenerateConfig(teacher="big", prompts="one.jsonl", engine="openai", base_url="http://x/v1")
    assert named(server) == [("prompts", "one.jsonl", False)]
    pairs = PairsConfig(model="a", prompts="one.jsonl", judge="b")
    assert ("judge", "b", True) in named(pairs)
    assert [role for role, _, _ in named(pairs.model_copy(update={"judge": "rewards:better"}))] == ["model", "prompts"]


def test_a_front_reads_what_its_policies_measured_on_the_way(place):
    (place / "a" / "evaluations.jsonl").write_text("{}\n")
    config = ParetoConfig(sft="init", policies=("a", "b"), prompts="one.jsonl", reward=("b",))
    assert ("policies", "a/evaluations.jsonl", False) in named(config)
    assert ("policies", "b", True) in named(config)


def test_an_earlier_front_is_every_file_but_its_pictures(place):
    (place / "front").mkdir()
    for name in ("front.json", "prompts.json", "samples.jsonl", "front.png", "front.svg", "front.csv", "gemma2.json"):
        (place / "front" / name).write_text("{}")
    config = ParetoConfig(sft="init", policies=("a",), prompts="one.jsonl", reward=("b",), fronts=("front",))
    assert [path for role, path, _ in named(config) if role == "fronts"] == [
        f"front/{name}" for name in ("front.json", "prompts.json", "samples.jsonl")
    ]


def test_a_source_is_a_model_or_its_gguf_file(place):
    assert named(ConvertConfig(source="a")) == [("source", "a", True)]
    (place / "g").mkdir()
    (place / "g" / "x.gguf").write_text("GGUF")
    assert (
        named(ConvertConfig(source="g")) == named(ConvertConfig(source="g/x.gguf")) == [("source", "g/x.gguf", False)]
    )


def test_a_merge_reads_its_base_first_also_the_one_that_its_models_record(place):
    from gemma2.core.outputs.digests import digest_weights

    models = {"method": "slerp", "models": ("a", "b")}
    assert named(MergeConfig(**models)) == [("input", "a", True), ("input", "b", True)]
    assert named(MergeConfig(**models, base="init"))[0] == ("base", "init", True)
    for name in ("a", "b"):
        parent = {"role": "policy", "path": "../init", "weights": digest_weights(place / "init")}
        write_json(place / name / "gemma2.json", {"status": "complete", "parents": [parent]})
    assert [(role, Path(path).name) for role, path, _ in named(MergeConfig(**models))] == [
        ("base", "init"),
        ("input", "a"),
        ("input", "b"),
    ]


def test_an_adapter_is_read_together_with_its_model(place):
    import numpy as np
    from safetensors.numpy import save_file

    (place / "lora").mkdir()
    factors = {"lora_A": np.ones((1, 4), np.float32), "lora_B": np.ones((4, 1), np.float32)}
    save_file(
        {f"base_model.model.model.layers.0.self_attn.q_proj.{key}.weight": value for key, value in factors.items()},
        place / "lora" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(place / "init")}
    write_json(place / "lora" / "adapter_config.json", settings)
    for model in ("lora", "init+lora"):
        found = named(MergeConfig(method="linear", models=(model,)))
        assert [(role, Path(path).name) for role, path, _ in found] == [("input", "lora"), ("adapter-base", "init")]
