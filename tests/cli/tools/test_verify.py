"""`gemma2 verify`, `pipeline status --why`, `pipeline diff`: exit codes, documents, and lines for people."""

import json
import shutil

import pytest
from typer import Exit

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.manifest import MANIFEST

ROWS = "data-00000-of-00001.jsonl"


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    """Rows -> one -> two, each an output of filter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "y z"}\n')
    assert invoke(["filter", "rows.jsonl", "--out", "one", "--quiet"]) == 0
    assert invoke(["filter", "one", "--out", "two", "--quiet"]) == 0
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def said(capsys):
    """Exit code, stdout and stderr of a command line."""

    def run(*words):
        try:
            code = invoke([*words])
        except Exit as ended:
            code = ended.exit_code
        return code, *capsys.readouterr()

    return run


def test_what_is_all_right_is_one_line(place, said):
    code, out, _ = said("verify", "two")
    assert code == 0 and out.startswith("2 outputs, 5 files, ") and out.endswith(": all right\n")
    assert out.count("\n") == 1


def test_what_is_wrong_is_a_row_each_and_the_exit_code_is_1(place, said):
    (place / "one" / ROWS).write_text("{}\n")
    code, out, err = said("verify", "two")
    lines = out.splitlines()
    assert code == 1 and lines[1].split()[:3] == ["one", ROWS, "damaged"]
    assert lines[-1].endswith(": 1 damaged") and "--fix" in err


def test_the_document_has_every_fault(place, said):
    (place / "two" / ROWS).unlink()
    (place / "rows.jsonl").write_text("other\n")
    code, out, _ = said("verify", "two", "--json")
    document = json.loads(out)
    assert (code, document["ok"]) == (1, False)
    kinds = {(fault["kind"], fault["file"]) for fault in document["faults"]}
    assert {("gone", ROWS), ("input changed", "rows.jsonl")} <= kinds
    assert [one["ok"] for one in document["outputs"]] == [False, True]
    assert document["files"] == 4 and document["bytes"] > 0


def test_an_input_that_changed_names_who_used_it_and_what_helps(place, said):
    (place / "rows.jsonl").write_text("other\n")
    code, out, err = said("verify", "two")
    assert code == 1 and "when one used it" in out and "input changed" in out
    assert "cannot be made again: restore it" in err


@pytest.mark.parametrize("damaged", ["one", "two"])
def test_fix_makes_it_again_and_says_that_the_bytes_are_the_same(place, said, damaged):
    text = (place / damaged / ROWS).read_text()
    (place / damaged / ROWS).write_text("{}\n")
    code, out, _ = said("verify", "two", "--fix")
    assert code == 0 and f"{damaged}: made again, with the recorded bytes" in out and "after --fix: all right" in out
    assert (place / damaged / ROWS).read_text() == text
    (place / damaged / ROWS).unlink()
    document = json.loads(said("verify", "two", "--fix", "--json")[1])
    assert [(one["same"], one["problem"]) for one in document["remade"]] == [(True, None)]
    assert document["ok"] and document["before"][0]["kind"] == "gone"


def test_what_cannot_be_made_again_is_said_and_stays_a_fault(place, said):
    (place / "one" / ROWS).unlink()
    (place / "rows.jsonl").unlink()
    code, out, _ = said("verify", "two", "--fix")
    assert code == 1 and "one: not made again: " in out and "after --fix: 1 gone" in out


def test_remarks_are_notes(place, said):
    (place / "one" / "mine.txt").write_text("x")
    (place / "rows.jsonl").unlink()
    code, _, err = said("verify", "one")
    assert code == 0
    assert "1 file that no manifest records: one/mine.txt" in err and "1 input not on the disk: rows.jsonl" in err


def test_a_path_without_a_record_is_an_error(place):
    for path in ("rows.jsonl", "gone"):
        with pytest.raises(InputError):
            invoke(["verify", path])


FILE = """
stages:
  a: {command: filter, options: {data: rows.jsonl}}
  b: {command: filter, options: {data: "${a.out}", min_words: 1}}
"""


@pytest.fixture
def run(place, said):
    """A finished pipeline in run/, put together from outputs of the same commands."""
    (place / "p.yaml").write_text(FILE)
    assert invoke(["filter", "rows.jsonl", "--out", "run/a", "--quiet"]) == 0
    assert invoke(["filter", "run/a", "--min-words", "1", "--out", "run/b", "--quiet"]) == 0
    said("pipeline", "status", "p.yaml", "--out", "run")
    return place / "run"


def test_why_shows_both_values_or_the_origin(run, said):
    where = ("pipeline", "status", "p.yaml", "--out", "run")
    _, out, _ = said(*where, "--set", "b.min_words=2", "--why", "b")
    assert out.splitlines()[0].startswith("b: changed") and out.splitlines()[2].split() == ["min_words", "1", "2"]
    (found,) = json.loads(said(*where, "--why", "a", "--json")[1])["stages"]
    assert found["status"] == "complete" and found["made_from"]["data"][0]["path"] == "../../rows.jsonl"
    assert len(json.loads(said(*where, "--why", "*", "--json")[1])["stages"]) == 2
    assert "hash" in said(*where, "--why", "a")[1]
    with pytest.raises(UsageError, match="no stage is called"):
        said(*where, "--why", "c")


def test_diff_shows_what_differs_and_counts_the_rest(run, said):
    shutil.copytree(run, "run-2")
    assert said("pipeline", "diff", "run", "run-2")[1] == "2 stages: 2 same\n"
    assert invoke(["filter", "run-2/a", "--min-words", "2", "--out", "run-2/b", "--quiet", "--force"]) == 0
    _, out, _ = said("pipeline", "diff", "run", "run-2")
    assert "2 stages: 1 same, 1 made from something else" in out
    assert ["min_words", "1", "2"] in [line.split() for line in out.splitlines()]
    assert json.loads(said("pipeline", "diff", "run", "run-2", "--json")[1])["runs"] == ["run", "run-2"]


def test_an_old_record_is_one_clear_line(run, said):
    for name in "ab":
        path = run / name / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 1}))
    code, out, err = said("verify", "run")
    assert code == 0 and out.count("\n") == 1 and err.count("2 outputs of a version that records") == 1
