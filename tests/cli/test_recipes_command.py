"""`gemma2 recipes` and `gemma2 config` on the command line."""

import json

import pytest

from gemma2.cli.main import run
from gemma2.configs import machine_recipes, recipes


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def of(*words: str) -> tuple[int, str, str]:
        code = run([*words])
        out, err = capsys.readouterr()
        return code, out, err

    return of


def test_the_list_has_every_recipe_with_the_memory_of_its_head(said):
    code, out, _ = said("recipes", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)["recipes"]}
    assert code == 0 and set(rows) == set(recipes())
    assert all((row["memory"] is not None) == (name in machine_recipes()) for name, row in rows.items())
    assert (rows["sft-9b-80gb"]["command"], rows["sft-9b-80gb"]["size"], rows["sft-9b-80gb"]["machine"]) == (
        "sft",
        "9b",
        "80gb",
    )


def test_the_list_can_be_narrowed_and_says_so_when_nothing_is_left(said):
    _, out, _ = said("recipes", "list", "--command", "sft", "--machine", "24gb")
    assert "sft-2b-24gb" in out and "rlhf" not in out and "80gb" not in out
    _, out, _ = said("recipes", "list", "--size", "27b", "--machine", "24gb", "--command", "warp")
    assert "no recipe for warp 27b 24gb" in out and "gemma2 recipes show" in out


def test_show_prints_a_recipe_and_says_why_there_is_none(said):
    assert said("recipes", "show", "sft-2b-24gb")[1] == machine_recipes()["sft-2b-24gb"].read_text(encoding="utf-8")
    code, _, err = said("recipes", "show", "warp-27b-24gb")
    assert code == 1 and err.count("\n") == 1
    assert "a GPU has 24.0 GB" in err and "the next that can: warp-27b-80gb" in err
    assert "did you mean 'sft-2b-24gb'" in said("recipes", "show", "sft-2b-24g")[2]
    assert "see gemma2 recipes list" in said("recipes", "show", "zzz")[2]


def test_a_command_that_is_given_such_a_name_says_the_same(said):
    code, _, err = said("warp", "--config", "warp-9b-24gb", "--sft", "s", "--prompts", "p", "--out", "o")
    assert code == 1 and "the next that can: warp-9b-80gb" in err


def test_a_copy_is_checked_and_names_itself(said, tmp_path):
    assert said("recipes", "copy", "rlhf-2b-80gb", "--dry-run")[0] == 0
    assert not [*tmp_path.iterdir()]
    assert said("recipes", "copy", "rlhf-2b-80gb")[0] == 0
    assert "--config rlhf-2b-80gb.yaml " in (tmp_path / "rlhf-2b-80gb.yaml").read_text(encoding="utf-8")
    assert said("recipes", "copy", "rlhf-2b-80gb")[0] == 1
    code, out, _ = said("config", "check", "rlhf-2b-80gb.yaml")
    assert code == 0 and "no faults (read as a recipe of gemma2 rlhf, by its first line)" in out


def test_a_plan_has_the_parts_and_the_command_line(said):
    code, out, _ = said("recipes", "plan", "sft-2b-80gb")
    assert code == 0 and "optimizer" in out and "fits: " in out and "gemma2 sft --config sft-2b-80gb" in out
    found = json.loads(said("recipes", "plan", "sft-2b-80gb", "--json")[1])
    assert found["fits"] and found["needed"] == pytest.approx(sum(found["parts"].values()))
    assert said("recipes", "plan", "align")[0] == 2


def test_check_exits_with_1_for_faults_and_has_them_as_json(said, tmp_path):
    (tmp_path / "r.yaml").write_text("# gemma2 sft: x\nepochs: 0\nlearning_rat: 1\n", encoding="utf-8")
    code, out, err = said("config", "check", "r.yaml")
    assert (code, err) == (1, "") and out.splitlines()[-1].startswith("r.yaml: 2 faults")
    found = json.loads(said("config", "check", "r.yaml", "--json")[1])
    assert [one["where"] for one in found["problems"]] == ["r.yaml:2:9", "r.yaml:3:1"] and not found["ok"]


def test_a_schema_goes_to_stdout_or_a_file(said, tmp_path):
    printed = json.loads(said("config", "schema", "reward", "pairs")[1])
    assert printed["title"] == "gemma2 reward pairs"
    assert said("config", "schema", "reward", "pairs", "--out", "s.json")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == printed
    assert said("config", "schema", "reward", "pairs", "--out", "s.json")[0] == 1


@pytest.mark.parametrize(
    ("old", "new"), [("config list --json", "recipes list --json"), ("config show a b", "recipes show a b")]
)
def test_the_old_spelling_is_answered_with_the_new_one(said, old, new):
    code, _, err = said(*old.split())
    assert code == 2 and err.count("\n") == 1 and err.endswith(f"write gemma2 {new}\n")
