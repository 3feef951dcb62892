"""Exit code 0 says that the work is done: that the output is there and complete, whatever the called code did."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from processes import MAIN, ROOT, finish, start
from text_model import write_text_model

from gemma2.cli import app, main
from gemma2.core.outputs.manifest import MANIFEST, write_manifest
from gemma2.core.outputs.promised import promise
from gemma2.core.ranks import RankEnd


@pytest.fixture
def command(monkeypatch):
    """Run `gemma2` in this process with a command of the test."""

    def run_with(body, *arguments):
        monkeypatch.setattr(app, "invoke", lambda given: body() or 0)
        return main.run([*arguments])

    return run_with


# --- code that ends the process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, None, 1, "a word"])
def test_called_code_that_ends_the_process_is_an_error_in_one_line(command, capsys, value):
    assert command(lambda: sys.exit(value)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    where = rf"{re.escape(__file__)}:\d+"
    assert re.fullmatch(rf"error: code that the command called ended it: sys\.exit\({value!r}\) \({where}\); .+\n", err)
    assert command(lambda: sys.exit(value), "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 1


def test_a_rank_ends_in_silence_with_the_code_of_rank_0(command, capsys):
    def body():
        raise RankEnd(3)

    assert command(body) == 3
    assert capsys.readouterr() == ("", "")


def test_a_broken_pipe_of_other_code_is_not_that_of_stdout(command):
    def body():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        command(body)


# --- what was promised ------------------------------------------------------------------------------------------------


def written(out, status="complete"):
    out.mkdir()
    write_text_model(out, "weights")
    write_manifest(out, {"status": status})


def nothing(out):
    pass


def unfinished(out):
    written(out, "running")


def without_a_file(out):
    written(out)
    next(path for path in out.iterdir() if path.name != MANIFEST).unlink()


def with_a_cut_file(out):
    written(out)
    next(path for path in out.iterdir() if path.name != MANIFEST).write_bytes(b"")


def with_a_cut_manifest(out):
    written(out)
    (out / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (nothing, "is not there, or has no manifest"),
        (unfinished, "is not complete;"),
        (without_a_file, "is missing or has another size"),
        (with_a_cut_file, "is missing or has another size"),
        (with_a_cut_manifest, "is not readable JSON"),
    ],
)
def test_a_command_whose_output_is_not_complete_does_not_end_with_0(command, capsys, tmp_path, work, message):
    out = tmp_path / "out"

    def body():
        promise(out)
        work(out)

    assert command(body) == 1
    err = capsys.readouterr().err
    assert message in err
    assert str(out) in err
    assert err.count("\n") == 1


def test_a_kept_promise_is_exit_code_0_and_does_not_bind_the_next_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def body():
        promise(Path("out"))
        written(Path("out"))
        os.chdir("/")

    assert command(body) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / MANIFEST).unlink()
    assert command(lambda: None) == 0


def test_a_promised_file_is_a_file(command, tmp_path):
    assert command(lambda: bool(promise(tmp_path / "page.html", file=True)) and 0) == 1
    (tmp_path / "page.html").write_text("page")
    assert command(lambda: bool(promise(tmp_path / "page.html", file=True)) and 0) == 0


def test_every_command_with_out_promises_it():
    """`execute` promises for the commands that are built from a schema."""
    places = [*(ROOT / "cli" / "stages").glob("*.py"), *(ROOT / "cli" / "tools").glob("*.py")]
    takers = [path for path in places if re.search(r"= (Out|OutFile|Page)\b,|required_out\(", path.read_text())]
    assert len(takers) >= 9
    assert [path.name for path in takers if "promise(" not in path.read_text()] == []
    assert "promise(" in (ROOT / "cli" / "terminal" / "options.py").read_text()


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    written(tmp_path / "modèle")
    return tmp_path / "modèle"


@pytest.mark.parametrize("closed", [[1], [2], [1, 2], [0, 1, 2]])
def test_closed_streams_change_no_exit_code_and_receive_no_file(tmp_path, model, closed):
    def close():
        for number in closed:
            os.close(number)

    page = tmp_path / "family.svg"
    process = start(MAIN, "lineage", model, "--format", "svg", "--out", page, preexec_fn=close)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert page.read_text().startswith("<svg")
    process = start(MAIN, "lineage", tmp_path / "gone", preexec_fn=close)
    code, out, err = finish(process)
    assert code == 1
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stdout_of_any_encoding_shows_every_character(tmp_path, encoding):
    name = "modèle-\U0001f600"
    written(tmp_path / name)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for form in ([], ["--json"]):
        process = start(MAIN, "lineage", tmp_path / name, *form, env=environment, encoding=encoding, errors="strict")
        code, out, err = finish(process)
        assert (code, err) == (0, "")
        if form:
            assert name in json.loads(out)["output"] if "output" in json.loads(out) else name in str(json.loads(out))
        elif encoding == "utf-8":
            assert name in out
        else:
            assert "\\ud83d\\ude00" in out
