"""Preference rows in every shape that TRL knows, read as the same pair; compared to TRL's own `extract_prompt`."""

from __future__ import annotations

import pytest
from row_reading import plain_reading, read_pairs
from trl import extract_prompt

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.preferences.pair_examples import tokenise_pairs
from gemma2.posttrain.tiny.networks import tiny_tokenizer


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


def read(tmp_path, row):
    (tmp_path / "rows.jsonl").write_bytes(to_line(row))
    (pair,) = read_pairs(tmp_path / "rows.jsonl")
    return pair


ASK, BLUE, GREEN = "What is the sky", "blue.", "green."
SHAPES = {
    "standard, explicit prompt": {"prompt": ASK, "chosen": BLUE, "rejected": GREEN},
    "standard, implicit prompt": {"chosen": f"{ASK} {BLUE}", "rejected": f"{ASK} {GREEN}"},
    "conversational, explicit prompt": {"prompt": [user(ASK)], "chosen": [model(BLUE)], "rejected": [model(GREEN)]},
    "conversational, implicit prompt": {"chosen": [user(ASK), model(BLUE)], "rejected": [user(ASK), model(GREEN)]},
    "messages as prompt, texts as answers": {"prompt": [user(ASK)], "chosen": BLUE, "rejected": GREEN},
    "the prompt under another name": {"question": ASK, "chosen": BLUE, "rejected": GREEN},
    "role model": {"prompt": [user(ASK)], "chosen": [{"role": "model", "content": BLUE}], "rejected": GREEN},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_pair(tmp_path, shape):
    chat = ChatFormat(tiny_tokenizer())
    (pair,), _ = tokenise_pairs([read(tmp_path, SHAPES[shape])], chat, 1024, plain_reading())
    prompt = f"<bos><start_of_turn>user\n{ASK}<end_of_turn>\n<start_of_turn>model\n"
    assert chat.tokenizer.decode(pair.chosen) == f"{prompt}{BLUE}<end_of_turn>"
    assert chat.tokenizer.decode(pair.rejected) == f"{prompt}{GREEN}<end_of_turn>"
    assert chat.tokenizer.decode(pair.chosen[: pair.prompt]) == prompt


def test_several_turns_before_the_answers_are_the_prompt(tmp_path):
    shared = [user("a"), model("b"), user("c")]
    pair = read(tmp_path, {"chosen": [*shared, model("d")], "rejected": [*shared, model("e")]})
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, [model("d")], [model("e")])


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("Q: a\nA: yes", "Q: a\nA: no"),
        ("one two three", "one two four"),
    ],
)
def test_an_implied_prompt_of_texts_is_trl_s_where_that_ends_a_word(tmp_path, chosen, rejected):
    pair = read(tmp_path, {"chosen": chosen, "rejected": rejected})
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    ours = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if theirs["prompt"][-1].isalpha() and theirs["chosen"][0].isalpha():  # TRL cuts inside "three" and "four"
        theirs = {"prompt": "one two", "chosen": " three", "rejected": " four"}
    assert {name: messages[0]["content"] for name, messages in ours.items()} == theirs


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is bright", "The sky is brown", "The sky is"),
        ("The sky is", "The sky is blue", "The sky"),
        ("The  sky  is blue", "The  sky  is red", "The  sky  is"),
        ("the same words", "the same words", "the same"),
    ],
)
def test_texts_are_split_after_the_last_word_they_share(tmp_path, chosen, rejected, prompt):
    pair = read(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert pair.prompt == [user(prompt)]
    assert prompt + pair.chosen[0]["content"] == chosen and prompt + pair.rejected[0]["content"] == rejected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "blue", "rejected": "bright"}, "share no prompt"),
        ({"chosen": "It is a", "rejected": [user("It"), model("b")]}, "of 'chosen' and 'rejected' one is a text"),
        ({"promt": "a", "chosen": "It is b", "rejected": "It is c"}, "--columns prompt=promt"),
    ],
)
def test_a_missing_prompt_is_refused_not_guessed(tmp_path, row, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, row)


def test_scores_of_the_sides_stay_columns(tmp_path):
    pair = read(tmp_path, SHAPES["standard, explicit prompt"] | {"score_chosen": 9.0, "score_rejected": 2, "margin": 1})
    assert pair.extra == {"score_chosen": 9.0, "score_rejected": 2} and pair.margin == 1.0
