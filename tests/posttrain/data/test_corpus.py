"""Small files in `tests/data`, one for each shape that people's data have and for each way in which they are wrong.

A right file gives exactly what it says. A wrong one is refused in one line with its place, and the fix of that line,
followed literally, leads to rows that can be learned.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT
from row_reading import plain_reading

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import example_of
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Conversation, Pair, Prompt
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.tiny.networks import tiny_tokenizer

CORPUS = ROOT / "tests" / "data"
OSK, SORT = ["u Where does the Osk rise?", "a In the hills of Yarrow."], ["u Sort these letters: d b a", "a a b d"]
BOTH = [OSK, SORT]
BRIEF = "s Answer briefly."
OWN = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
YES = ["u Say yes.", "- no", "u I asked for yes.", "a yes"]  # "-": a model turn that is not learned

CONVERSATIONS = {
    **{
        path.relative_to(CORPUS).as_posix(): BOTH
        for folder in ("formats", "conversations")
        for path in sorted((CORPUS / folder).iterdir())
    },
    "formats/line-breaks.csv": [["u Where does the Osk rise?\nSay it in one line, please.", OSK[1]]],
    "conversations/alpaca-input.jsonl": [["u Sort the letters.\n\nc a b", "a a b c"]],
    "conversations/alpaca-history.jsonl": [[BRIEF, OSK[0], "- In the hills of Yarrow.", *SORT]],
    "conversations/dolly.jsonl": [[f"{OSK[0]}\n\nThe Osk is a river.", OSK[1]]],
    **{
        f"conversations/{name}.jsonl": [[BRIEF, *row] for row in BOTH]
        for name in ("sharegpt-system", "developer", "system-column", "system-prompt-column")
    },
    **{f"conversations/{name}.jsonl": [YES] for name in ("weights", "trainable", "train-key")},
}
del CONVERSATIONS["formats/prompts.txt"]
PROMPTS = {
    path.relative_to(CORPUS).as_posix(): [OSK[:1], SORT[:1]] for path in sorted((CORPUS / "prompts").iterdir())
} | {
    "formats/prompts.txt": [OSK[:1], SORT[:1]],
    "prompts/instruction.jsonl": [["u Sort the letters.\n\nc a b"]],
    "prompts/system.jsonl": [[BRIEF, OSK[0]], [BRIEF, SORT[0]]],
}
PAIRS = {path.relative_to(CORPUS).as_posix(): BOTH for path in sorted((CORPUS / "pairs").iterdir())} | {
    f"pairs/{name}.jsonl": [[BRIEF, *row] for row in BOTH] for name in ("system-question", "system-in-answers")
}


def as_lines(row: Conversation | Prompt) -> list[str]:
    silent = row.unlearned if isinstance(row, Conversation) else frozenset()
    return [
        f"{'-' if m['role'] == 'assistant' and i in silent else m['role'][0]} {m['content'].strip()}"
        for i, m in enumerate(row.messages)
    ]


def pair_as_lines(row: Pair) -> list[str]:
    assert [m["content"].strip() for m in row.rejected] == ["I will not say."]
    return as_lines(Prompt(row.where, [*row.prompt, *row.chosen]))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_what_its_file_says(name):
    assert [as_lines(row) for row in plain_reading().conversations(CORPUS / name)] == CONVERSATIONS[name]


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_what_its_file_says(name):
    assert [as_lines(row) for row in plain_reading().prompts(CORPUS / name)] == PROMPTS[name]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_what_its_file_says(name):
    assert [pair_as_lines(row) for row in plain_reading().pairs(CORPUS / name)] == PAIRS[name]


@pytest.mark.parametrize(
    ("name", "aside"),
    [
        ("formats/splits", ["extra.csv", "test.jsonl"]),
        ("formats/split-folders", ["test/"]),
        ("formats/hub-clone", ["data/test-00000-of-00001.parquet"]),
        ("formats/saved-splits", ["test/"]),
    ],
)
def test_what_a_folder_holds_besides_is_named(interrupting, name, aside):
    reading, progress = plain_reading(), interrupting()
    reading.conversations(CORPUS / name)
    assert reading.report(progress)["unread_files"] == [f"{CORPUS / name}/{one}" for one in aside]
    assert progress.warnings == [f"{CORPUS / name}: not read: {', '.join(aside)}"]


@pytest.mark.parametrize(
    ("name", "rows"), [("splits@test", 1), ("split-folders@test", 1), ("hub-clone@test", 1), ("saved-splits@test", 2)]
)
def test_another_split_of_a_folder_can_be_named(name, rows):
    assert len(plain_reading().conversations(CORPUS / "formats" / name)) == rows


@pytest.mark.parametrize(
    ("name", "unread"),
    [("sharegpt", {"id": 2}), ("dolly", {"category": 1}), ("messages-and-prompt", {"prompt": 2, "prompt_id": 2})],
)
def test_columns_that_nothing_reads_are_named_with_their_count(interrupting, name, unread):
    reading, progress = plain_reading(), interrupting()
    reading.conversations(CORPUS / f"conversations/{name}.jsonl")
    assert reading.report(progress) == {"unread_columns": unread}
    assert len(progress.warnings) == 1 and all(
        f"{name} ({n} rows)" in progress.warnings[0] for name, n in unread.items()
    )


# --- what is wrong ----------------------------------------------------------------------------------------------------

WRONG = sorted(path.relative_to(CORPUS) for folder in CORPUS.glob("wrong*") for path in folder.iterdir())
KINDS = {"wrong": "conversations", "wrong-pairs": "pairs", "wrong-prompts": "prompts"}


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        text = path.read_bytes()
        assert old.encode() in text
        path.write_bytes(text.replace(old.encode(), new.encode()))

    return edit


def without_line_2(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))


def copied_from(name: str) -> Callable[[Path], None]:
    """What an advice to write a file again, or to convert it elsewhere, comes to."""

    def copy(path: Path) -> None:
        source = CORPUS / name
        if source.is_dir():
            shutil.rmtree(path)
            shutil.copytree(source, path)
        else:
            target = path if path.is_file() else path / source.name
            target.write_bytes(source.read_bytes())

    return copy


# What the advice of each file says to do, where it is not an option of the command line.
EDITS: dict[str, Callable[[Path], None]] = {
    "messages-plain-text.jsonl": replaced(
        '"Hello"', '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]'
    ),
    "misspelt-role.jsonl": replaced("assistent", "assistant"),
    "half-weight.jsonl": replaced("0.5", "1"),
    "weight-of-user.jsonl": without_line_2,
    "weights-contradict.jsonl": replaced('"weight": 0, ', ""),
    "all-masked.jsonl": replaced('"weight": 0', '"weight": 1'),
    "key-twice.jsonl": replaced('"prompt": "a", ', ""),
    "key-twice-inside.jsonl": replaced('[{"role": "user", "role"', '[{"role": "user", "content": "a"}, {"role"'),
    "empty-prompt.jsonl": without_line_2,
    "empty-messages.jsonl": replaced("[]", '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'),
    "number-as-answer.jsonl": replaced(": 4}", ': "4"}'),
    "string-in-messages.jsonl": replaced(
        '["Sort these letters: d b a", "a b d"]',
        '[{"role": "user", "content": "Sort these letters: d b a"}, {"role": "assistant", "content": "a b d"}]',
    ),
    "two-systems.jsonl": replaced('"system": "Be brief.", ', ""),
    "plain-texts.jsonl": replaced('{"text": ', '{"prompt": "Where does it rise?", "completion": '),
    "history-of-texts.jsonl": replaced('["a", "b"]', '[["a", "b"]]'),
    "cut-off.jsonl": without_line_2,
    "single-quotes.jsonl": replaced("{'prompt': 'a'}", '{"prompt": "a", "completion": "b"}'),
    "not-an-object.jsonl": replaced('"text"\n', '{"prompt": "text", "completion": "b"}\n'),
    "latin-1.jsonl": lambda path: path.write_bytes(path.read_bytes().decode("latin-1").encode()),
    "half-a-character.jsonl": replaced("\\ud83d", "\\ud83d\\ude00"),
    "cut-off.json": copied_from("formats/array.json"),
    "no-comma.json": replaced("} {", "}, {"),
    "text-after.json": replaced("\nend", "\n"),
    "utf-16.csv": lambda path: path.write_bytes(path.read_bytes().decode("utf-16").encode()),
    "table-without-suffix": lambda path: path.rename(path.with_suffix(".csv")),
    "spreadsheet.xlsx": lambda path: path.with_suffix(".csv").write_bytes((CORPUS / "formats/table.csv").read_bytes()),
    "cut-off.jsonl.gz": copied_from("formats/packed.jsonl.gz"),
    "not-packed.jsonl.zst": copied_from("formats/packed.jsonl.zst"),
    "not-a.parquet": copied_from("formats/columns.parquet"),
    "empty.jsonl": copied_from("formats/lines.jsonl"),
    "header-only.csv": copied_from("formats/table.csv"),
    "no-header.csv": replaced("Where does", "prompt,completion\nWhere does"),
    "more-fields.csv": replaced("Sort: a, b, c", '"Sort: a, b, c"'),
    "column-twice.csv": replaced("prompt,prompt", "prompt,first"),
    "open-quote.csv": replaced('"Sort', "Sort"),
    "gap": lambda path: (path / "data-00001-of-00003.jsonl").write_bytes((CORPUS / "formats/lines.jsonl").read_bytes()),
    "gap-of-tables": lambda path: (path / "train-00000-of-00002.csv").write_bytes(
        (CORPUS / "formats/table.csv").read_bytes()
    ),
    "no-data": copied_from("formats/lines.jsonl"),
    "one-is-a-text.jsonl": replaced(
        '[{"role": "user", "content": "Sort these letters: d b a"}, '
        '{"role": "assistant", "content": "I will not say."}]',
        '"Sort these letters: d b a I will not say."',
    ),
    "weighted.jsonl": replaced(', "weight": 0', ""),
    "null.jsonl": replaced("null", '"Why?"'),
}


# What a user chooses where the advice leaves the choice.
CHOICES = {"other-columns.jsonl": ("prompt=ask", "completion=reply")}


def learned(path: Path, kind: str, **options: object) -> list[object]:
    """The rows of a file as far as they are tokens: read, and taken by Gemma's template."""
    reading = Reading(SftConfig(model="m", data=path, **options))
    chat = ChatFormat(tiny_tokenizer())
    rows: list[object] = []
    for row in getattr(reading, kind)(path):
        with reading.usable(row):
            if isinstance(row, Conversation):
                rows.append(example_of(row, chat, SftConfig(model="m", data=path)))
            elif isinstance(row, Pair):
                rows.append(chat.example([*row.prompt, *row.chosen]))
            else:
                rows.append(chat.prompt_ids(row.messages))
    return rows


def follow(hint: str, path: Path, kind: str) -> list[object]:
    """Do what a hint says."""
    if "NAME" in hint:
        return learned(path, kind, columns=CHOICES[path.name])
    for flag, name in (("--columns", "columns"), ("--ignore-keys", "ignore_keys"), ("--on-bad-row", "on_bad_row")):
        if found := re.search(rf"{flag} ([^\s;,)]+(?:,[^\s;)]+)*)", hint):
            value = found[1] if name == "on_bad_row" else tuple(found[1].split(","))
            return learned(path, kind, **{name: value})
    if command := re.search(r"gemma2 (data convert .*)", hint):
        words = shlex.split(command[1])
        assert invoke(words) == 0
        return learned(Path(words[-1]), kind)
    if place := re.search(r"(?:give|name) one(?: of them)?: (\S+)", hint):
        return learned(Path(place[1]), kind)
    EDITS[path.name](path)
    return learned(
        path if (path.suffix and path.suffix != ".xlsx") or path.is_dir() else path.with_suffix(".csv"), kind
    )


@pytest.mark.parametrize("name", WRONG, ids=str)
def test_a_wrong_file_is_refused_with_its_place_and_a_fix_that_leads_to_a_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = CORPUS / name
    path = tmp_path / name.name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    kind = KINDS[name.parts[0]]
    with pytest.raises(InputError) as caught:
        learned(path, kind)
    error = caught.value
    assert str(error).startswith(str(path)) and "\n" not in str(error) and error.hint
    assert follow(error.hint, path, kind)


def test_there_are_enough_files_and_every_edit_is_used():
    assert len([path for path in CORPUS.rglob("*") if path.is_file()]) >= 80
    assert EDITS.keys() <= {path.name for path in WRONG}


# --- names of columns and conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("renames", "words"),
    [
        (("ask=prompt",), "'ask=prompt' is the wrong way round; write prompt=ask"),
        (("promt=ask",), "nothing reads 'promt'; write prompt=ask"),
    ],
)
def test_a_rename_that_cannot_be_meant_is_refused(renames, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        learned(CORPUS / "wrong/other-columns.jsonl", "conversations", columns=renames)


def test_a_column_that_no_row_has_is_named_before_what_follows_from_it():
    with pytest.raises(InputError, match="has a column 'Ask'; did you mean 'ask'"):
        learned(CORPUS / "wrong/other-columns.jsonl", "conversations", columns=("prompt=Ask", "completion=reply"))


@pytest.mark.parametrize("named", ["dialog", "messages"])
def test_lists_in_a_renamed_column_are_converted_as_the_advice_says(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    cell = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).replace('"', '""')
    Path("rows.csv").write_text(f'id,dialog\n1,"{cell}"\n')
    with pytest.raises(InputError) as caught:
        learned(Path("rows.csv"), "conversations", columns=("messages=dialog",))
    command = re.search(r"gemma2 (data convert .*)", caught.value.hint)
    assert command is not None and "--columns messages=dialog --parse-json messages" in command[1]
    words = shlex.split(command[1].replace("--parse-json messages", f"--parse-json {named}"))
    assert invoke(words) == 0
    assert learned(Path(words[-1]), "conversations")


def test_rows_without_an_answer_still_give_their_prompts(tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "prompts.jsonl"
    rows.write_bytes(to_line({"instruction": "a", "output": ""}) + to_line({"messages": [*OWN, *OWN]}))
    assert invoke(["data", "convert", str(rows), "--to", "prompts", "--out", str(out), "--quiet"]) == 0
    assert [as_lines(row) for row in plain_reading().prompts(out)] == [["u a"], ["u x", "a y", "u x"]]


def test_places_in_tables_are_those_of_the_file(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text('sep=;\nprompt;completion\na;b\n\n"c\nd";e\nf;g\n')
    places = [row.where.rpartition(":")[2] for row in plain_reading().conversations(table)]
    assert places == ["3", "5-6", "7"]


def test_records_that_swallow_the_lines_behind_them_are_counted(tmp_path, capsys):
    table = tmp_path / "rows.csv"
    table.write_text('prompt,completion\na,b\n"c,d\ne,f\ng"",h\n",x\ni,j\n')
    assert invoke(["data", "inspect", str(table), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["records_of_several_lines"]) == (3, 1)
