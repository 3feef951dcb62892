"""The generation config and the special tokens that a merge chooses: of a model, of the base, or of a file."""

import json
import re

import pytest
from model_files import random_arrays, write_model
from tokenizer_models import LETTERS, config_of, model, write_tokenizer
from tokenizer_models import arrays as shaped

from gemma2.cli import main
from gemma2.core.errors import InputError, UsageError
from gemma2.merging import MergeRequest, merge, plan_merge
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.merging.recipes.run_recipe import merge_recipe

GENERATION = {
    "model 1": {"eos_token_id": 1, "temperature": 0.6, "transformers_version": "5"},
    "model 2": {"eos_token_id": [3, 1], "bos_token_id": 2},
    "base": {"eos_token_id": 5},
    "file": {"eos_token_id": [7], "top_p": 0.9},
}
SPECIAL = {
    "model 1": {"eos_token": "a", "pad_token": "b", "add_bos_token": True},
    "model 2": {"eos_token": {"content": "d", "lstrip": False}},
    "base": {"bos_token": "e", "eos_token": "f"},
    "file": {"eos_token": "h", "unk_token": "i"},
}
CHOICES = {"1": "model 1", "2": "model 2", "base": "base", "file": "file"}


@pytest.fixture
def root(tmp_path):
    for seed, (name, role) in enumerate({"base": "base", "a": "model 1", "b": "model 2"}.items()):
        path = model(tmp_path / name, random_arrays(seed), eos_token_id=9)
        (path / "generation_config.json").write_text(json.dumps(GENERATION[role]))
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "X"} | SPECIAL[role]))
    (tmp_path / "asking.json").write_text(json.dumps(GENERATION["file"]))
    (tmp_path / "tokens.json").write_text(json.dumps(SPECIAL["file"]))
    return tmp_path


def request(root, **options):
    models = (root / "a", root / "b")
    return MergeRequest(**{"method": "task-arithmetic", "models": models, "base": root / "base"} | options)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_chosen_generation_config_is_that_of_the_output_and_its_ids_are_in_config_too(root, choice):
    named = str(root / "asking.json") if choice == "file" else choice
    result = merge(request(root, generation_config=named), out=root / "out")
    assert config_of(root / "out", "generation_config.json") == {"eos_token_id": 9} | GENERATION[CHOICES[choice]]
    assert config_of(root / "out")["eos_token_id"] == GENERATION[CHOICES[choice]]["eos_token_id"]
    assert not any("end an answer" in line or "generation configs" in line for line in result.warnings)
    assert any(note.startswith("generation config: ") for note in result.plan.notes)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_chosen_special_tokens_are_those_of_the_output(root, choice):
    named = str(root / "tokens.json") if choice == "file" else choice
    result = merge(request(root, special_tokens=named), out=root / "out")
    expected = SPECIAL[CHOICES[choice]] | (SPECIAL["model 1"] | SPECIAL["file"] if choice == "file" else {})
    assert config_of(root / "out", "tokenizer_config.json") == {"tokenizer_class": "X"} | expected
    in_map = {key: value for key, value in config_of(root / "out", "special_tokens_map.json").items()}
    assert in_map.items() <= expected.items()
    assert in_map["eos_token"] == expected["eos_token"]
    assert not any("special tokens" in line for line in result.warnings)


ADVICE = re.compile(r"; choose: (?P<flag>--[a-z-]+) (?P<choices>.+)$")


def test_every_choice_that_a_warning_names_runs_and_ends_the_warning(root, capsys):
    """Also of models that lack what another has, which cannot be chosen by their number."""
    third = write_model(root / "c", random_arrays(3), "BF16")
    write_tokenizer(third, LETTERS)
    (root / "b/chat_template.jinja").write_text("{{ b }}")
    (root / "mine.jinja").write_text("{{ mine }}")
    files = {"--chat-template": "mine.jinja", "--generation-config": "asking.json", "--special-tokens": "tokens.json"}
    models = [str(root / name) for name in "abc"]
    lines = plan_merge(request(root, method="linear", base=None, models=tuple(map(root.joinpath, "abc"))), root / "out")
    advised = {line: found for line in lines.warnings if (found := ADVICE.search(line))}
    assert {found["flag"] for found in advised.values()} == {*files, "--dtype"}
    for line, found in advised.items():
        for choice in re.split(", | or ", found["choices"]):
            value = str(root / files[found["flag"]]) if choice == "a file" else choice
            command = ["merge", "linear", *models, found["flag"], value, "--out", str(root / "merged"), "--force"]
            assert main.run(command) == 0, command
            said = capsys.readouterr().err
            assert line.partition(":")[0] not in said
            assert line.partition(":")[0] in "".join(lines.warnings)


def test_a_difference_in_sampling_is_a_warning_too(root):
    (line,) = (line for line in plan_merge(request(root), root / "out").warnings if "generation configs" in line)
    assert "temperature 0.6 in model 1, none in model 2; the output has that of model 1; choose: --gen" in line


@pytest.mark.parametrize("name", ["generation_config", "special_tokens"])
@pytest.mark.parametrize(("choice", "message"), [("7", "model 7 is not among"), ("nowhere.json", "is not a file")])
def test_what_is_not_there_is_refused(root, name, choice, message):
    with pytest.raises(UsageError, match=message):
        plan_merge(request(root, **{name: choice}), root / "out")


def test_a_file_with_tokens_that_the_output_lacks_is_refused(root):
    (root / "asking.json").write_text('{"eos_token_id": [1, 4000]}')
    with pytest.raises(InputError, match="eos_token_id 4000 is not a token"):
        plan_merge(request(root, generation_config=str(root / "asking.json")), root / "out")
    (root / "tokens.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(InputError, match="has no '<nowhere>', the eos_token"):
        plan_merge(request(root, special_tokens=str(root / "tokens.json")), root / "out")
    (root / "tokens.json").write_text('{"language": "x"}')
    with pytest.raises(InputError, match="names no special token"):
        plan_merge(request(root, special_tokens=str(root / "tokens.json")), root / "out")


def test_with_a_tokenizer_the_ids_of_a_chosen_generation_config_follow_their_tokens(tmp_path):
    for name, (core, end) in {"a": (LETTERS, 0), "b": (LETTERS[::-1], 0)}.items():
        path = model(tmp_path / name, shaped(len(name)), core)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    models = (tmp_path / "a", tmp_path / "b")
    asked = MergeRequest(method="linear", models=models, tokenizer=str(models[0]), generation_config="2")
    plan = plan_merge(MergeRequest(method="linear", models=models, tokenizer=str(models[0])), tmp_path / "out")
    (line,) = plan.warnings  # the ids are equal, the tokens are not
    assert line.startswith("ids that end an answer differ: a in model 1, j in model 2; the output has those of model 1")
    merge(asked, out=tmp_path / "out")
    assert config_of(tmp_path / "out", "generation_config.json") == {"eos_token_id": [9]}  # "j" of the first


def test_a_merge_file_and_its_recipe_take_them_and_a_changed_copy_is_refused(root):
    values = {"method": "linear", "models": [str(root / name) for name in "ab"]}
    asked = values | {"generation_config": str(root / "asking.json"), "special_tokens": str(root / "tokens.json")}
    (root / "asked.json").write_text(json.dumps(asked))
    merge_recipe(read_recipe(root / "asked.json"), out=root / "out")
    recorded = {one["role"]: one["path"] for one in config_of(root / "out", "gemma2.json")["data"]}
    assert recorded == {"generation_config": "../asking.json", "special_tokens": "../tokens.json"}
    merge_recipe(read_recipe(root / "out/merge.yaml"), out=root / "again")
    for name in (
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "config.json",
        "merge.yaml",
    ):
        assert (root / "out" / name).read_bytes() == (root / "again" / name).read_bytes(), name
    (root / "numbers.json").write_text(json.dumps(values | {"generation_config": 2, "special_tokens": "2"}))
    merge_recipe(read_recipe(root / "numbers.json"), out=root / "numbered")
    assert "generation_config: '2'" in (root / "numbered/merge.yaml").read_text()
    assert config_of(root / "numbered", "generation_config.json")["eos_token_id"] == [3, 1]
    for option, name in (("generation_config", "generation_config.json"), ("special_tokens", "tokenizer_config.json")):
        kept = (root / "out" / name).read_text()
        (root / "out" / name).write_text(kept.replace("{", '{"x": 1,', 1))
        with pytest.raises(InputError, match=f"{option} .*{name} is not the file that the recipe records"):
            merge_recipe(read_recipe(root / "out/merge.yaml"), out=root / "changed")
        (root / "out" / name).write_text(kept)


def test_a_model_directory_that_is_called_base_is_not_a_file(root, monkeypatch):
    monkeypatch.chdir(root)
    values = {"method": "task-arithmetic", "base": "base", "models": ["a", "b"]}
    (root / "asked.json").write_text(json.dumps(values | {"generation_config": "base", "chat_template": "base"}))
    (root / "base/chat_template.jinja").write_text("{{ base }}")
    merge_recipe(read_recipe(root / "asked.json"), out=root / "out")
    assert config_of(root / "out", "generation_config.json")["eos_token_id"] == 5
    assert (root / "out/chat_template.jinja").read_text() == "{{ base }}"
