"""Overlap with evaluation sets, by hand: 13 consecutive words, or a whole short question."""

import json

import numpy as np
import pytest
from samples import said

from gemma2.core.errors import InputError
from gemma2.posttrain.filters.criteria.contamination import contaminated, ngram_hashes, read_evaluation
from gemma2.posttrain.filters.criteria.sample import word_ids, words_of

LONG = "A train leaves the station at nine and reaches the coast after three hours of slow travel, how far is it?"
WORDS = words_of(LONG)


def evaluation(tmp_path, *rows, n=13):
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return read_evaluation([path], n)


@pytest.fixture
def held_out(tmp_path):
    return evaluation(
        tmp_path,
        {"question": LONG, "answer": "It is 7."},
        {"question": "What is 5 plus 2?", "answer": "7"},
        {"question": "Name the river of Yarrow.", "answer": " ".join(f"step{i}" for i in range(20))},
    )


def test_ngrams_are_those_of_the_words():
    ids = word_ids(["a", "b", "c", "a", "b"])
    hashes = ngram_hashes(ids, 2)
    assert len(hashes) == 4 and hashes[0] == hashes[3] and len(np.unique(hashes)) == 3
    assert len(ngram_hashes(ids, 5)) == 1 and len(ngram_hashes(ids, 6)) == 0
    assert ngram_hashes(word_ids(["a", "b"]), 2) != ngram_hashes(word_ids(["b", "a"]), 2)


def overlapping(count):
    """A text of other words around `count` words of the long question."""
    return " ".join(["before", "it", *WORDS[2 : 2 + count], "and", "after"])


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        (LONG, "60 miles", "shares 9 13-grams with an evaluation set"),
        (LONG.upper().replace(",", " -"), "60", "shares 9 13-grams with an evaluation set"),
        (overlapping(13), "60", "shares 1 13-grams with an evaluation set"),
        (overlapping(15), "60", "shares 3 13-grams with an evaluation set"),
        ("Hm?", overlapping(14), "shares 2 13-grams with an evaluation set"),
        ("Hm?", " ".join(f"step{i}" for i in range(3, 16)), "shares 1 13-grams with an evaluation set"),
        ("What is 5 plus 2?", "7", "asks a question of an evaluation set"),
        ("what is  5 plus 2", "7", "asks a question of an evaluation set"),
        ("WHAT IS 5 PLUS 2?!", "8", "asks a question of an evaluation set"),
        ("Name the river of Yarrow", "Lune", "asks a question of an evaluation set"),
        (overlapping(12), "60", None),
        ("What is 5 plus 3?", "8", None),
        ("What is 2 plus 5?", "7", None),
        ("7", "7", None),
        ("It is 7.", "It is 7.", None),
        ("Tell me: what is 5 plus 2?", "7", None),
        ("What is it?", "What is 5 plus 2?", None),
        (" ".join(WORDS[::-1]), "60", None),
        (" ".join(WORDS[::2]), "60", None),
        ("Name the town of Yarrow.", "Lune", None),
        (" ".join(f"step{i}" for i in range(3, 15)), "", None),
    ],
)
def test_overlap_by_hand(held_out, question, answer, found):
    assert contaminated(said(answer, question), held_out) == found


def test_smaller_ngrams_find_more(tmp_path):
    found = evaluation(tmp_path, {"prompt": LONG}, n=8)
    assert contaminated(said("60", overlapping(9)), found) == "shares 2 8-grams with an evaluation set"


def test_words_of_two_turns_are_not_in_a_row(held_out):
    assert contaminated(said(" ".join(WORDS[9:]), " ".join(WORDS[:9])), held_out) is None


def test_instructions_that_many_items_share_are_not_items(tmp_path):
    intro = "The following is a multiple choice question about physics, answer with one letter only."
    items = [{"prompt": f"{intro} Item number {i} asks about thing {i} and its colour {i}?"} for i in range(11)]
    found = evaluation(tmp_path, *items)
    assert contaminated(said("B", f"{intro} What is mass?"), found) is None
    assert contaminated(said("B", items[3]["prompt"]), found) is not None
    found = evaluation(tmp_path, *items[:10])
    assert contaminated(said("B", f"{intro} What is mass?"), found) is not None


def test_evaluation_sets_may_be_messages_and_need_a_question(tmp_path):
    messages = [{"role": "user", "content": "What is 5 plus 2?"}, {"role": "assistant", "content": "Seven, I say."}]
    found = evaluation(tmp_path, {"messages": messages})
    assert contaminated(said("7", "What is 5 plus 2?"), found) is not None
    assert contaminated(said("7", "Seven, I say."), found) is None
    with pytest.raises(InputError, match=r"eval.jsonl:2: no column with the question"):
        evaluation(tmp_path, {"question": "What?"}, {"frage": "Was?"})
