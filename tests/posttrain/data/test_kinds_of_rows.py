"""What a row is taken for does not depend on the command: pairs are pairs, and two answers are refused by all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from row_reading import plain_reading

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.data.own_form import kind_of_rows
from gemma2.posttrain.data.shapes.recognise import ANSWERED, LISTS
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.filters.criteria.sample import sample_of

USER, MODEL, WORSE = (
    {"role": "user", "content": "asked"},
    {"role": "assistant", "content": "better"},
    {"role": "assistant", "content": "worse"},
)
TEXTS = {"prompt": "asked", "chosen": "better", "rejected": "worse"}
WHOLE = {"chosen": [USER, MODEL], "rejected": [USER, WORSE]}
SPOKEN = {side: f"\n\nHuman: asked\n\nAssistant: {side}" for side in ("chosen", "rejected")}
# Pairs, and the column renames with which their chosen answers are learned ("": no advice).
PAIRS = {
    **{name: (TEXTS | {name: "metadata"}, "completion=chosen") for name in ANSWERED},
    "text": (TEXTS | {"text": "\n\nHuman: a\n\nAssistant: b"}, "completion=chosen"),
    "alpaca": ({"instruction": "asked", "output": "x", "chosen": "better", "rejected": "worse"}, "completion=chosen"),
    "whole": (WHOLE | {"prompt": "asked", "answer": "metadata"}, "completion=chosen"),
    "chosen twice": (WHOLE | {"prompt": "asked", "messages": [USER, MODEL]}, "messages=chosen"),
    "spoken": (SPOKEN | {"answer": "metadata"}, ""),
    "spoken alone": (SPOKEN, "text=chosen"),
    **{
        f"prompt in {name}": ({name: [USER], "chosen": MODEL, "rejected": WORSE}, f"prompt={name},completion=chosen")
        for name in LISTS
    },
}


def written(path: Path, *rows: dict[str, object]) -> Path:
    path.write_bytes(b"".join(map(to_line, rows)))
    return path


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_never_read_as_a_conversation_whatever_columns_it_also_has(tmp_path, name):
    row, renames = PAIRS[name]
    path = written(tmp_path / "rows.jsonl", row)
    assert kind_of_rows(path, plain_reading()) == "pairs"
    assert [pair.chosen for pair in plain_reading().pairs(path)]
    with pytest.raises(InputError, match="1: a preference pair, where a conversation is needed; ") as caught:
        plain_reading().conversations(path)
    with pytest.raises(InputError, match="a preference pair"):  # as gemma2 filter reads it
        sample_of(next(plain_reading().rows(path)))
    advice = re.search(r"--columns (\S+)", caught.value.hint)
    assert (advice[1] if advice else "") == renames
    if renames:
        (learned,) = plain_reading(columns=tuple(renames.split(","))).conversations(path)
        assert [turn["role"] for turn in learned.messages] == ["user", "assistant"]
        assert learned.messages[1]["content"] in ("better", "chosen")


def test_a_row_whose_other_side_is_null_is_a_conversation(tmp_path):
    path = written(tmp_path / "rows.jsonl", {"prompt": "a", "answer": "b", "chosen": None, "rejected": None})
    assert kind_of_rows(path, plain_reading()) == "conversations"
    assert len(plain_reading().conversations(path)) == 1


@pytest.mark.parametrize("name", ["prompt", *LISTS])
def test_the_prompt_of_a_pair_can_be_converted_wherever_it_is(tmp_path, name):
    asked = "asked" if name == "prompt" else [USER]
    path = written(tmp_path / "rows.jsonl", {name: asked, "chosen": "b", "rejected": "c"})
    out = tmp_path / "out.jsonl"
    assert invoke(["data", "convert", str(path), "--to", "prompts", "--out", str(out), "--quiet"]) == 0
    assert json.loads(out.read_text()) == {"prompt": [USER], "chosen": "b", "rejected": "c"}


# --- several names for one thing --------------------------------------------------------------------------------------

TWICE = [
    ({"prompt": "a", "answer": "b", "response": "c"}, "completion=answer"),
    ({"prompt": "a", "output": "b", "solution": "c"}, "completion=output"),
    ({"question": "a", "query": "b", "answer": "c"}, "prompt=question"),
]


@pytest.mark.parametrize(("row", "renames"), TWICE)
def test_two_names_of_other_people_are_refused_by_every_command_and_the_advice_chooses(tmp_path, capsys, row, renames):
    path, out = written(tmp_path / "rows.jsonl", row), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=f"could both be the .*--columns {renames}"):
        plain_reading().conversations(path)
    assert invoke(["data", "inspect", str(path)]) == 1
    assert f"--columns {renames}" in capsys.readouterr().out
    convert = ["data", "convert", str(path), "--out", str(out), "--quiet"]
    with pytest.raises(InputError, match=f"--columns {renames}"):
        invoke(convert)
    assert not out.exists()
    assert invoke([*convert, "--columns", renames]) == 0
    (learned,) = plain_reading().conversations(out)
    assert [turn["content"] for turn in learned.messages] == [
        row.get("prompt", row.get("question")), row.get("answer", row.get("output"))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"prompt": "a", "completion": "b", "answer": "c"}, "answer"),
        ({"prompt": "a", "question": "c", "answer": "b"}, "question"),
        ({"messages": [USER, MODEL], "completion": "c"}, "completion"),
    ],
)
def test_our_own_name_wins_and_the_other_column_is_named(tmp_path, interrupting, row, unread):
    path, reading = written(tmp_path / "rows.jsonl", row), plain_reading()
    (learned,) = reading.conversations(path)
    assert "c" not in [turn["content"] for turn in learned.messages]
    assert reading.report(interrupting())["unread_columns"] == {unread: 1}
    assert kind_of_rows(path, plain_reading()) == "conversations"


def test_prompts_with_a_number_as_their_answer_stay_prompts(tmp_path):
    path = written(tmp_path / "rows.jsonl", {"prompt": "a", "answer": 4})
    assert kind_of_rows(path, plain_reading()) == "prompts"
