"""Data files: what is read, what is refused and with which words, and the split."""

from __future__ import annotations

import pytest
from row_reading import read_conversations, read_pairs, read_prompts

from gemma2.core.errors import InputError
from gemma2.posttrain.data.rows import located, split
from gemma2.posttrain.data.sources import to_line

USER = {"role": "user", "content": "Hi"}
MODEL = {"role": "assistant", "content": "Hello"}


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(row if isinstance(row, bytes) else to_line(row) for row in rows))
    return path


def test_text_and_messages_give_the_same_prompt(tmp_path):
    text, messages = read_prompts(write(tmp_path, {"prompt": "Hi"}, {"prompt": [USER]}))
    assert text.messages == messages.messages == [USER]


def test_prompts_keep_their_other_columns_and_know_their_line(tmp_path):
    path = write(tmp_path, {"prompt": "a", "answer": "7"}, b"\n", {"prompt": "b", "task": {"x": 1}})
    first, second = read_prompts(path)
    assert first.extra == {"answer": "7"} and second.extra == {"task": {"x": 1}}
    assert (first.where, second.where) == (f"{path}:1", f"{path}:3")


def test_limit_reads_no_further_than_it_must(tmp_path):
    assert len(read_prompts(write(tmp_path, {"prompt": "a"}, {"prompt": "b"}, b"not json"), limit=2)) == 2


def test_prompt_and_completion_are_learned_from_the_completion_on(tmp_path):
    (row,) = read_conversations(write(tmp_path, {"prompt": [USER, MODEL, USER], "completion": "Yes"}))
    assert row.messages == [USER, MODEL, USER, {"role": "assistant", "content": "Yes"}]
    assert row.learn_from == 3 and not row.truncated


def test_messages_are_learned_from_the_beginning(tmp_path):
    (row,) = read_conversations(write(tmp_path, {"messages": [USER, MODEL], "source": "x"}))
    assert row.messages == [USER, MODEL] and row.learn_from == 0 and row.extra == {"source": "x"}


def test_a_completion_that_ran_into_the_limit_is_marked(tmp_path):
    one = {"prompt": "a", "completion": "b", "finish_reason": "length"}
    several = {"messages": [USER, MODEL], "finish_reason": "length"}
    assert [row.truncated for row in read_conversations(write(tmp_path, one, several))] == [True, True]


def test_pairs_in_all_shapes(tmp_path):
    no = {"role": "assistant", "content": "No"}
    path = write(
        tmp_path,
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": [USER], "chosen": [MODEL], "rejected": [no]},
        {"chosen": [USER, MODEL], "rejected": [USER, no]},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "rejected_truncated": True, "margin": 2},
    )
    pairs = read_pairs(path)
    assert all((p.prompt, p.chosen, p.rejected) == ([USER], [MODEL], [no]) for p in pairs)
    assert [(p.chosen_truncated, p.rejected_truncated, p.margin) for p in pairs[2:]] == [
        (False, False, None),
        (False, True, 2.0),
    ]


def test_a_pair_of_equal_conversations_keeps_its_last_turn(tmp_path):
    (pair,) = read_pairs(write(tmp_path, {"chosen": [USER, MODEL], "rejected": [USER, MODEL]}))
    assert pair.prompt == [USER] and pair.chosen == pair.rejected == [MODEL]


BAD = {
    "no json": (read_prompts, b"{'prompt': 1}\n", ":2: not JSON (Expecting property name"),
    "cut off": (read_prompts, b'{"prompt": "a\n', ":2: not JSON"),
    "not an object": (read_prompts, b"[1]\n", ":2: a list, not a JSON object"),
    "latin 1": (
        read_prompts,
        '{"prompt": "é"}\n'.encode("latin-1"),
        ":2: not UTF-8 (invalid continuation byte at byte 13)",
    ),
    "too deep": (read_prompts, b"[" * 100_000, ":2: nested too deeply"),
    "typo": (read_prompts, {"promt": "a", "answer": "b"}, ":2: no 'prompt'; name the columns: --columns prompt=promt"),
    "other columns": (
        read_prompts,
        {"x": "a", "y": "b"},
        ":2: no 'prompt'; say which of x, y they are: --columns prompt=NAME",
    ),
    "wrong type": (read_prompts, {"prompt": 3}, ":2: 'prompt' is the number 3; write a text, or a list of messages"),
    "null": (read_prompts, {"prompt": None}, ":2: 'prompt' is null"),
    "empty list": (read_prompts, {"prompt": []}, ":2: 'prompt' is an empty list"),
    "blank": (read_prompts, {"prompt": " \n"}, ":2: the prompt is empty"),
    "text in list": (read_prompts, {"prompt": ["a"]}, ":2: 'prompt[0]' is a text"),
    "no role": (read_prompts, {"prompt": [{"rol": "user", "content": "a"}]}, "no 'role'; rename 'rol' to 'role'"),
    "parts": (read_prompts, {"prompt": [{"role": "user", "content": [1]}]}, "'prompt[0].content[0]' is the number 1"),
    "half a character": (read_prompts, b'{"prompt": "\\ud83d"}\n', "'prompt' holds half of a surrogate pair"),
    "neither, one misspelt": (read_conversations, {"promt": "a", "x": "b"}, "--columns prompt=promt"),
    "no completion": (read_conversations, {"prompt": "a", "complettion": "b"}, "--columns completion=complettion"),
    "neither": (
        read_conversations,
        {"mesages": []},
        "nor 'prompt' and 'completion'; name the columns: --columns messages=mesages",
    ),
    "no rejected": (read_pairs, {"prompt": "a", "chosen": "b", "rejcted": "c"}, "--columns rejected=rejcted"),
    "no prompt": (read_pairs, {"chosen": "b", "rejected": "c"}, "share no prompt"),
    "nothing shared": (read_pairs, {"chosen": [MODEL], "rejected": [MODEL]}, "share no prompt"),
    "flag": (read_pairs, {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_truncated": 1}, "write true or false"),
    "margin": (read_pairs, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "finite number"),
}


@pytest.mark.parametrize(("read", "row", "words"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_with_file_line_and_mend(tmp_path, read, row, words):
    good = {"prompt": "a"} | ({"chosen": "c", "rejected": "d"} if read is read_pairs else {"completion": "b"})
    path = write(tmp_path, good, row)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ") and words in str(caught.value)
    assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_prompts, read_conversations, read_pairs])
def test_a_file_without_rows_is_refused(tmp_path, read):
    with pytest.raises(InputError, match="has no rows"):
        read(write(tmp_path, b"\n \n"))


def test_a_prompt_may_be_in_another_column_or_be_messages_that_end_with_a_user(tmp_path):
    path = write(tmp_path, {"question": "Hi", "answer": "7"}, {"messages": [USER, MODEL, USER]})
    named, messages = read_prompts(path)
    assert named.messages == [USER] and named.extra == {"answer": "7"}
    assert messages.messages == [USER, MODEL, USER]


def test_messages_that_end_with_a_model_turn_are_no_prompt(tmp_path):
    with pytest.raises(InputError, match=r":1: 'messages' end with a turn of the assistant"):
        read_prompts(write(tmp_path, {"messages": [USER, MODEL]}))


def rows_of(tmp_path, *prompts):
    return read_prompts(write(tmp_path, *({"prompt": p} for p in prompts)))


def test_the_split_depends_on_the_prompt_and_the_seed_only(tmp_path):
    rows = rows_of(tmp_path, *(f"question {i}" for i in range(400)))
    train, heldout = split(rows, 0.25, seed=1)
    assert 60 < len(heldout) < 140  # binomial(400, 1/4): mean 100, 4.6 standard deviations either way
    assert sorted([*train, *heldout], key=rows.index) == rows
    assert split(rows[:200], 0.25, seed=1)[1] == [row for row in rows[:200] if row in heldout]
    assert split(rows, 0.25, seed=2)[1] != heldout


def test_a_prompt_is_never_on_both_sides(tmp_path):
    rows = rows_of(tmp_path, *(f"question {i % 7} " for i in range(70)))
    train, heldout = split(rows, 0.4, seed=0)
    assert train and heldout and not {r.key for r in train} & {r.key for r in heldout}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_sides_get_a_prompt_where_there_are_two(tmp_path, fraction):
    train, heldout = split(rows_of(tmp_path, "a", "b"), fraction, seed=0)
    assert len(train) == len(heldout) == 1


def test_nothing_is_held_out_at_fraction_zero_or_from_one_prompt(tmp_path):
    assert split(rows_of(tmp_path, "a", "b"), 0.0, seed=0)[1] == []
    assert split(rows_of(tmp_path, "a", "a"), 0.5, seed=0)[1] == []


def test_a_line_is_utf8_and_one_line():
    assert to_line({"a": "é\n"}) == '{"a": "é\\n"}\n'.encode()


def test_located_puts_the_place_in_front():
    with pytest.raises(InputError) as caught, located("f:3"):
        raise InputError("bad", "mend it")
    assert str(caught.value) == "f:3: bad; mend it"
