"""`gemma2 data inspect` and `data convert`: an option without effect is named, a refusal leaves the output alone."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.data.sources import to_line

ODD = [{"ask": "a", "reply": "b"}, {"ask": "c", "reply": "d"}]
CHATS = [{"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("odd.jsonl", ODD), ("chats.jsonl", CHATS)):
        Path(name).write_bytes(b"".join(map(to_line, rows)))
    return tmp_path


def run(line: str) -> int:
    return invoke(shlex.split(line))


# Flags that name something that no row has; what is said, and the flags that were meant.
WITHOUT_USE = {
    "--columns prompt=ask,completion=nope": ("--columns: no row .* 'nope'", "--columns prompt=ask,completion=reply"),
    "--columns prompt=ask,completion=replyy": ("did you mean 'reply'", "--columns prompt=ask,completion=reply"),
    "--columns prompt=nope,completion=reply --on-bad-row skip": (
        "--columns: no row .* 'nope'",
        "--columns prompt=ask,completion=reply",
    ),
    "--columns prompt=ask,completion=reply --parse-json nosuch": (
        "--parse-json: no row .* 'nosuch'",
        "--columns prompt=ask,completion=reply --parse-json reply",
    ),
}


@pytest.mark.parametrize("flags", WITHOUT_USE)
@pytest.mark.parametrize("earlier", [None, "a good earlier file\n"])
def test_a_name_that_no_row_has_is_refused_before_anything_is_written(folder, flags, earlier):
    out, (words, _) = folder / "out.jsonl", WITHOUT_USE[flags]
    if earlier is not None:
        out.write_text(earlier)
    with pytest.raises(InputError, match=words):
        run(f"data convert odd.jsonl {flags} --out out.jsonl --force")
    assert (out.read_text() if out.exists() else None) == earlier
    assert sorted(path.name for path in folder.iterdir() if path != out) == ["chats.jsonl", "odd.jsonl"]


def test_the_names_that_were_meant_convert(folder):
    rows = folder / "odd.jsonl"
    rows.write_bytes(to_line({"ask": "a", "reply": '[{"role": "assistant", "content": "b"}]'}))
    assert run("data convert odd.jsonl --columns prompt=ask,completion=reply --parse-json reply --out out.jsonl") == 0
    assert json.loads((folder / "out.jsonl").read_text())["completion"] == [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("flags", [flags for flags in WITHOUT_USE if "--parse-json" not in flags])
def test_inspect_refuses_a_column_that_no_row_has_as_convert_does(folder, flags):
    with pytest.raises(InputError, match=WITHOUT_USE[flags][0]):
        run(f"data inspect odd.jsonl {flags.partition(' --on-bad-row')[0]}")


@pytest.mark.parametrize("key", ["role", "content", "weight", "train", "trainable"])
def test_a_key_that_every_message_is_read_by_cannot_be_ignored(folder, key):
    for command in ("data inspect chats.jsonl", "data convert chats.jsonl --out out.jsonl"):
        with pytest.raises(UsageError, match=f"--ignore-keys {key}"):
            run(f"{command} --ignore-keys name,{key}")
    assert run("data convert chats.jsonl --out out.jsonl --ignore-keys name") == 0


def test_a_key_that_no_message_has_is_named(folder, capsys):
    assert run("data convert chats.jsonl --out out.jsonl --ignore-keys name,nosuch") == 0
    said = capsys.readouterr().err
    assert "--ignore-keys nosuch: no message" in said and "--ignore-keys name" not in said
    assert run("data inspect chats.jsonl --ignore-keys name,nosuch --json") == 0
    assert json.loads(capsys.readouterr().out)["ignored_keys_without_use"] == ["nosuch"]
    assert run("data inspect chats.jsonl --ignore-keys name,nosuch") == 0
    assert re.search("ignore-keys that no message has.*nosuch", capsys.readouterr().out)


@pytest.mark.parametrize("out", ["odd.jsonl.gz", "x.jsonl.gz", "x.json.zst", "x.csv", "rows", "rows.v2", "odd.csv"])
def test_the_name_that_is_advised_for_an_output_can_be_written(folder, out):
    with pytest.raises(InputError, match=r"is not a \.jsonl file; write to ") as caught:
        run(f"data convert odd.jsonl --columns prompt=ask,completion=reply --out {out}")
    advised = caught.value.hint.removeprefix("write to ")
    assert advised.count(".jsonl") == 1
    assert run(f"data convert odd.jsonl --columns prompt=ask,completion=reply --out {advised}") == 0


# --- bad rows and numbers ---------------------------------------------------------------------------------------------

KINDS = 9  # of bad rows, more than a person is shown


def test_every_kind_of_bad_row_has_its_places(folder, capsys):
    good = {"prompt": "a", "completion": "b"}
    bad = [{"prompt": "a", "completion": number} for number in range(KINDS) for _ in range(KINDS - number)]
    Path("rows.jsonl").write_bytes(b"".join(map(to_line, [good, *bad])))
    assert run("data inspect rows.jsonl --as conversations --json") == 0
    errors = json.loads(capsys.readouterr().out)["errors"]
    assert [error["rows"] for error in errors] == [KINDS - number for number in range(KINDS)]
    line = 2
    for error in errors:
        assert error["first"] == [f"rows.jsonl:{line + i}" for i in range(min(3, error["rows"]))]
        line += error["rows"]
    assert run("data inspect rows.jsonl --as conversations") == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:2, rows.jsonl:3, rows.jsonl:4, ..." in shown
    assert "and 4 more kinds of bad rows: --json lists them all" in shown and shown.count("bad rows (") == 5


def test_what_json_cannot_hold_becomes_null_and_is_counted(folder, capsys):
    Path("rows.jsonl").write_text(
        '{"prompt": "a", "completion": "b", "score": NaN, "deep": {"x": [1.5, Infinity]}}\n'
        '{"prompt": "c", "completion": "d", "score": 0.5, "deep": {"x": [2.5]}}\n'
    )
    assert run("data convert rows.jsonl --out out.jsonl --json") == 0
    assert json.loads(capsys.readouterr().out)["nan_as_null"] == {"score": 1, "deep": 1}

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    rows = [json.loads(line, parse_constant=refuse) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(row["score"], row["deep"]) for row in rows] == [(None, {"x": [1.5, None]}), (0.5, {"x": [2.5]})]
    assert run("data convert odd.jsonl --columns prompt=ask,completion=reply --out two.jsonl --json") == 0
    assert "nan_as_null" not in json.loads(capsys.readouterr().out)
