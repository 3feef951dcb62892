"""What a file holds around its rows: keys next to an array, splits in one document, other line ends, no rows at all.

The advice of each refusal, followed literally, leads to rows.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from row_reading import plain_reading

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.data.sources import RowSample, count_rows

ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
WRAPPED = {
    "alone": ({"data": ROWS}, []),
    "first": ({"data": ROWS, "version": 1, "info": {}}, ["version", "info"]),
    "last": ({"version": 1, "tags": ["x"], "data": ROWS}, ["version", "tags"]),
    "an empty array": ({"test": [], "train": ROWS}, ["test"]),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(content: object, name: str = "rows.json") -> Path:
    Path(name).write_text(json.dumps(content))
    return Path(name)


def asked(path: Path) -> list[str]:
    return [row.messages[0]["content"] for row in plain_reading().conversations(path)]


@pytest.mark.parametrize("name", WRAPPED)
def test_the_array_of_an_object_is_read_and_the_other_keys_are_named(interrupting, capsys, name):
    content, keys = WRAPPED[name]
    path, reading, progress = saved(content), plain_reading(), interrupting()
    assert [row.messages[0]["content"] for row in reading.conversations(path)] == ["a", "c"]
    assert reading.report(progress).get("unread_keys", {}) == dict.fromkeys(keys, 1)
    assert [line.partition(": ")[2] for line in progress.warnings] == (
        [f"keys next to the rows that are not read: {', '.join(keys)}"] if keys else []
    )
    assert count_rows(path) == 2
    assert invoke(["data", "inspect", str(path), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["unread_keys"]) == keys
    sample = RowSample(500, 2500)
    assert [row.columns["question"] for row in sample.rows([path])] == ["a", "c"]


def test_renamed_columns_do_not_hide_the_other_keys(interrupting):
    reading = plain_reading(columns=("prompt=question", "completion=answer"))
    reading.conversations(saved({"data": ROWS, "version": 1}))
    assert reading.report(interrupting())["unread_keys"] == {"version": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": TALK, "tools": [{"name": "f"}]},
        {"prompt": "a", "completion": "b", "documents": [{"title": "t"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 1},
    ],
)
def test_an_object_with_columns_of_a_row_is_one_row(row):
    assert asked(saved(row)) == ["a"]


def test_a_list_of_messages_under_another_name_is_a_column_of_one_row():
    path = saved({"dialog": TALK, "id": 1})
    assert len(plain_reading(columns=("messages=dialog",)).conversations(path)) == 1


def test_splits_in_one_document_are_refused_and_files_of_them_are_read():
    content = {"train": ROWS, "test": ROWS[:1], "version": 1}
    with pytest.raises(InputError, match=r"rows\.json holds rows under 'train' and 'test'; .*train\.json, test\.json"):
        asked(saved(content))
    assert len(asked(saved(content["train"], "train.json"))) == 2
    assert len(asked(saved(content["test"], "test.json"))) == 1


# --- carriage returns -------------------------------------------------------------------------------------------------

MAC = {
    "rows.csv": "prompt,completion\ra,b\rc,d\r",
    "rows.tsv": "prompt\tcompletion\ra\tb\rc\td\r",
    "rows.jsonl": '{"prompt": "a", "completion": "b"}\r{"prompt": "c", "completion": "d"}\r',
    "rows.txt": "a\rc\r",
}


@pytest.mark.parametrize("name", MAC)
def test_a_file_whose_lines_end_with_carriage_returns_is_refused_with_what_ends_them(name):
    Path(name).write_bytes(MAC[name].encode())
    kind = "prompts" if name.endswith(".txt") else "conversations"
    with pytest.raises(InputError, match=r"line feeds, as with tr '\\r' '\\n' < ") as caught:
        getattr(plain_reading(), kind)(Path(name))
    command = "tr " + caught.value.hint.partition(" as with tr ")[2]
    subprocess.run(command, shell=True, check=True)
    rows = getattr(plain_reading(), kind)(Path(f"lines-{name}"))
    assert [row.messages[0]["content"] for row in rows] == ["a", "c"]


def test_a_carriage_return_inside_a_table_is_a_fault_of_its_row():
    Path("rows.csv").write_bytes(b"prompt,completion\na,b\nc\rc,d\n")
    with pytest.raises(InputError, match=r"rows\.csv:3: .*; put fields with line breaks in double quotes"):
        asked(Path("rows.csv"))
    Path("rows.csv").write_bytes(b'prompt,completion\r\na,b\r\n"c\rc",d\r\n')
    assert asked(Path("rows.csv")) == ["a", "c\rc"]


# --- no rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words", "more"),
    [
        ("rows.csv", "prompt,completion\n", "a row on each line below", "a,b\n"),
        ("rows.csv", "", "a line with the names of its columns", "prompt,completion\na,b\n"),
        ("rows.jsonl", "\n", "one JSON object per line", '{"prompt": "a", "completion": "b"}\n'),
        ("rows.txt", "\n", "one prompt per line", "a\n"),
    ],
)
def test_a_file_without_rows_is_refused_with_what_a_row_of_its_format_is(name, content, words, more):
    path = Path(name)
    path.write_text(content)
    reads = [count_rows, lambda path: plain_reading().prompts(path)]
    for read in [*reads, lambda path: invoke(["data", "inspect", str(path)])]:
        with pytest.raises(InputError, match=f"{name} has no rows; .*{words}"):
            read(path)
    path.write_text(content + more)
    assert count_rows(path) == len(plain_reading().prompts(path)) == 1
