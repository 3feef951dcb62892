"""`gemma2 pipeline`: files, folders and recipes by name; the plan; the graph; errors of one line."""

import json

import pytest

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, OutputError, UsageError

FILE = """
vars: {words: 1}
stages:
  a: {command: filter, options: {data: rows.jsonl, min_words: "${vars.words}"}}
  b: {command: filter, options: {data: "${a.out}"}, matrix: {min_words: [1, 2]}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "y z"}\n')
    (tmp_path / "p.yaml").write_text(FILE)
    return tmp_path


@pytest.fixture
def said(capsys):
    def run(*words: str) -> str:
        assert invoke(["pipeline", *words]) == 0
        return capsys.readouterr().out

    return run


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, said):
    before = sorted(place.rglob("*"))
    document = json.loads(said("run", "p.yaml", "--out", "out", "--dry-run", "--json"))
    assert [(row["stage"], row["action"]) for row in document["plan"]] == [
        ("a", "run"), ("b/min_words-1", "run"), ("b/min_words-2", "run"),
    ]  # fmt: skip
    assert (document["to_run"], document["stages"]) == (3, 3)
    assert all(row["memory_gib"] > 0 for row in document["plan"])
    assert sorted(place.rglob("*")) == before
    assert "b/min_words-2" in said("run", "p.yaml", "--out", "out", "--dry-run")


def test_chosen_stages_show_in_the_plan(place, said):
    def actions(*choice: str) -> list[str]:
        document = json.loads(said("run", "p.yaml", "--out", "out", "--dry-run", "--json", *choice))
        return [row["action"] for row in document["plan"]]

    assert actions("--only", "a") == ["run", "left out", "left out"]
    assert actions("--from", "a") == ["run", "run", "run"]
    assert actions("--force", "a") == ["again", "run", "run"]


@pytest.mark.parametrize(("form", "part"), [("text", "b/min_words-2"), ("mermaid", "-->"), ("svg", "<svg")])
def test_the_graph_names_every_stage(place, said, form, part):
    text = said("graph", "p.yaml", "--format", form)
    assert part in text
    assert all(name in text for name in ("min_words-1", "min_words-2", "filter"))


def test_a_graph_replaces_a_file_only_with_force(place, said):
    said("graph", "p.yaml", "--format", "svg", "--write", "g.svg")
    first = (place / "g.svg").read_text()
    with pytest.raises(OutputError, match=r"g\.svg exists"):
        said("graph", "p.yaml", "--write", "g.svg")
    said("graph", "p.yaml", "--format", "svg", "--write", "g.svg", "--force")
    assert (place / "g.svg").read_text() == first


def test_status_lists_the_stages_to_run_and_writes_nothing(place, said):
    rows = json.loads(said("status", "p.yaml", "--out", "out", "--json"))["stages"]
    assert [row["status"] for row in rows] == ["to run"] * 3
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["run", "p.yaml"], UsageError, "--out is missing"),
        (["run", "gone.yaml", "--out", "o"], InputError, r"gone\.yaml does not exist; give a YAML file"),
        (["run", "p.yaml", "--out", "o", "--only", "c"], UsageError, "no stage is called 'c'"),
        (["run", "p.yaml", "--out", "o", "--only", "b"], InputError, "needs a, which is neither complete nor chosen"),
        (["run", "p.yaml", "--out", "o", "--set", "a.min_wrds=1"], UsageError, "did you mean 'min_words'"),
        (["run", "p.yaml", "--out", "o", "--set", "vars.words=none"], UsageError, r"'stages\.a\.options\.min_words'"),
        (["run", "p.yaml", "--out", "o", "--ray-address", "x"], UsageError, "is for --executor ray"),
        (["status", "."], InputError, "is not the folder of a pipeline"),
        (["run", "p.yaml", "--out", "rows.jsonl"], OutputError, "exists and is not a directory"),
        (["run", "p.yaml", "--out", "."], OutputError, "does not name a directory|holds something else"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_gives_an_error_of_one_line(place, words, error, text):
    with pytest.raises(error, match=text) as caught:
        invoke(["pipeline", *words])
    assert "\n" not in str(caught.value)
