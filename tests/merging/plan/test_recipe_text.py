"""The recipe of an output: repeated it gives the same bytes, from any folder; changed inputs are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from model_files import added, random_arrays, read_model, write_model
from tokenizer_models import LETTERS, write_tokenizer

from gemma2.cli import main
from gemma2.core.errors import InputError
from gemma2.core.outputs.model_identity import digest_model
from gemma2.core.yaml_files import read_documents
from gemma2.merging import MergeRequest, merge
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.merging.recipes.run_recipe import merge_recipe


@pytest.fixture
def root(tmp_path):
    base = random_arrays(0)
    write_model(tmp_path / "base", base, "BF16")
    for number in (1, 2):
        path = write_model(tmp_path / f"rl-{number}", added(base, random_arrays(number, 0.1)), "BF16")
        write_tokenizer(path, LETTERS, [(f"<{number}>", 10)])
        (path / "chat_template.jinja").write_text(f"of {number}")
    write_tokenizer(tmp_path / "base", LETTERS)
    (tmp_path / "mine.jinja").write_text("{{ mine }}")
    return tmp_path


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name not in ("gemma2.json", "README.md")}


def repeated(out, again):
    return merge_recipe(read_recipe(out / "merge.yaml"), out=again)


RULES = "[{match: self_attn, layers: [0, 0.5, 1]}, {match: mlp, value: 0.3}, 0.5]"
RECIPES = {
    "defaults": "{method: linear, models: [rl-1, rl-2], tokenizer: union}",
    "rules": f"{{method: slerp, models: [rl-1, rl-2], base: base, tokenizer: base, t: {RULES}}}",
    "a gradient": "{method: slerp, models: [rl-1, rl-2], base: base, tokenizer: rl-2, t: [0, 0.3, 1]}",
    "numbers of models": (
        "{method: ties, base: base, tokenizer: union, dtype: float32, granularity: tensor, models: "
        "[{model: rl-1, weight: 1, density: 0.3}, {model: rl-2, weight: 0.5, density: {layers: [0.2, 0.6]}}]}"
    ),
    "seeds and switches": "{method: dare, models: [rl-1, rl-2], base: base, tokenizer: base, seed: 7, rescale: false}",
    "slices": (
        "{method: passthrough, models: [rl-1, rl-2], tokenizer: rl-1, "
        "slices: [{sources: [{model: rl-1, layers: [0, 2]}]}, {sources: [{model: 1, layers: [1, 2]}], scale: 0.5}]}"
    ),
    "a template of a model": "{method: linear, models: [rl-1, rl-2], tokenizer: union, chat_template: 2}",
    "a template in a file": "{method: linear, models: [rl-1, rl-2], tokenizer: union, chat_template: mine.jinja}",
    "mergekit": (
        "{merge_method: ties, base_model: base, tokenizer_source: union, dtype: float32, out_dtype: bfloat16, models: "
        "[{model: rl-1, parameters: {weight: 1, density: [0.2, 0.6]}}, {model: rl-2, parameters: {weight: "
        "[{filter: mlp, value: 0.5}, {value: 0.8}]}}]}"
    ),
    "tokens": (
        "{merge_method: linear, tokenizer: {source: union, pad_to_multiple_of: 8, "
        "tokens: {<1>: {source: rl-1, force: true}}}, "
        "models: [{model: rl-1, parameters: {weight: 1}}, {model: rl-2, parameters: {weight: 2}}]}"
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_the_recipe_of_an_output_repeats_it_to_the_same_bytes_from_another_folder(root, case, monkeypatch):
    (root / "asked.yaml").write_text(RECIPES[case])
    merge_recipe(read_recipe(root / "asked.yaml"), out=root / "out")
    elsewhere = root / "deep/elsewhere"
    elsewhere.mkdir(parents=True)
    shutil.copytree(root / "base", root / "deep/rl-1")  # ../rl-1 of this folder is another model
    monkeypatch.chdir(elsewhere)
    repeated(root / "out", root / "again")
    assert files(root / "out") == files(root / "again")
    before = digest_model(root / "again")
    assert digest_model(root / "out") == before
    (root / "again/merge.yaml").write_text("# for people: not a part of the model")
    assert digest_model(root / "again") == before


def test_each_of_several_outputs_has_its_own_eta(root):
    request = MergeRequest(
        method="liti", models=(root / "rl-1",), base=root / "base", etas=(0.1, 0.5), tokenizer="base"
    )
    merge(request, out=root / "front")
    for eta in ("0.10", "0.50"):
        again = root / f"front/again-{eta}"
        repeated(root / f"front/eta-{eta}", again)
        assert files(again) == files(root / f"front/eta-{eta}")


def test_what_was_allowed_is_in_the_recipe(root):
    config = root / "rl-2/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_activation": "gelu"}))
    options = {"allow_config": ("hidden_activation",), "tokenizer": "union"}
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2"), **options), out=root / "out")
    repeated(root / "out", root / "again")
    assert files(root / "out") == files(root / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [("weights", r"input .*rl-2 is not the model that the recipe records: its weights have the digest"),
     ("config", r"input .*rl-2 is not the model that the recipe records: its config.json differs"),
     ("template", r"input .*rl-2 is not the model .*: its chat_template.jinja differs")],
)  # fmt: skip
def test_an_input_that_is_another_model_by_now_is_refused_by_name(root, change, message):
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2"), tokenizer="union"), out=root / "out")
    path = root / "rl-2"
    if change == "weights":
        arrays = read_model(path)
        arrays["model.norm.weight"] = np.ones(8)
        write_model(path, arrays, "BF16")
    elif change == "config":
        config = json.loads((path / "config.json").read_text()) | {"rms_norm_eps": 1e-6}
        (path / "config.json").write_text(json.dumps(config))
    else:
        (path / "chat_template.jinja").write_text("changed")
    with pytest.raises(InputError, match=message):
        repeated(root / "out", root / "again")
    assert not (root / "again").exists()


def test_a_recipe_with_other_models_is_refused(root):
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2"), tokenizer="union"), out=root / "out")
    text = (root / "out/merge.yaml").read_text()
    (root / "out/merge.yaml").write_text(text.replace("- ../rl-2\n", "- ../rl-2\n- ../base\n", 1))
    with pytest.raises(InputError, match="the recipe records 2 inputs, this merge has 3"):
        repeated(root / "out", root / "again")


def test_the_recipe_names_no_place_of_this_machine_and_is_shown(root, capsys):
    merge(MergeRequest(method="linear", models=(root / "rl-1", root / "rl-2"), tokenizer="union"), out=root / "out")
    text = (root / "out/merge.yaml").read_text()
    assert str(root) not in text
    (document,) = read_documents(root / "out/merge.yaml")
    assert document["models"] == ["../rl-1", "../rl-2"]
    assert [one["role"] for one in document["inputs"]] == ["input", "input"]
    assert "Recipe: gemma2 merge --config merge.yaml" in (root / "out/README.md").read_text()
    assert main.run(["recipes", "show", str(root / "out")]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    assert main.run(["merge", "--config", str(root / "out"), "--out", str(root / "again")]) == 0
    assert files(root / "out") == files(root / "again")


def test_an_adapter_is_recorded_with_its_model(root):
    from safetensors.numpy import save_file

    lora = root / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    names = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {names.format("A"): np.ones((2, 8), np.float32), names.format("B"): np.ones((8, 2), np.float32)}
    save_file(pair, lora / "adapter_model.safetensors")
    adapted = Path(f"{root / 'rl-1'}+{lora}")
    merge(MergeRequest(method="linear", models=(adapted,)), out=root / "out")
    assert read_documents(root / "out/merge.yaml")[0]["models"] == ["../rl-1+../lora"]
    repeated(root / "out", root / "again")
    assert files(root / "out") == files(root / "again")
