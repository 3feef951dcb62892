"""Stop strings are found in the text, wherever the tokens begin and end."""

from __future__ import annotations

import random

import pytest

from gemma2.posttrain.generation.engines import Completion
from gemma2.posttrain.generation.engines.stops import before_stop, stops_at, text_completion

ALPHABET = "ab€😀 \n"


def drawn_tokens(draw):
    """Text as tokens of no to five bytes, which cut characters, and some of which are not text at all."""
    content = "".join(draw.choices(ALPHABET, k=draw.randrange(2, 60))).encode()
    tokens = []
    while content:
        size = draw.choice([0, 1, 1, 2, 3, 5])
        tokens.append(content[:size] if draw.random() < 0.95 else b"\xff")
        content = content[size:]
    return tokens


@pytest.mark.parametrize("seed", range(200))
def test_a_turn_ends_with_the_token_that_completes_a_stop_string(seed):
    draw = random.Random(seed)
    tokens = drawn_tokens(draw)
    stops = ["".join(draw.choices(ALPHABET, k=draw.choice([1, 2, 3, 6, 15]))) for _ in range(draw.choice([1, 3]))]
    if draw.random() < 0.3:  # a long one that does occur
        text = b"".join(tokens).decode(errors="ignore")
        stops.append(text[len(text) // 3 :][:40] or "a")

    def decode(ids):
        return b"".join(tokens[i] for i in ids).decode(errors="replace")

    ends = stops_at(stops, decode)
    for length in range(1, len(tokens) + 1):
        ids = list(range(length))
        expected = any(stop in decode(ids) for stop in stops)
        assert ends(ids) == expected
        if expected:
            break


def test_only_the_end_of_a_long_turn_is_decoded():
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return "x" * len(ids)

    assert not stops_at(["stop"], decode)(list(range(10_000)))
    assert max(asked) < 100


def test_the_first_of_several_stop_strings_counts_and_is_not_part_of_the_answer():
    assert before_stop(["c", "b"], "abcd") == "a" and before_stop(["x"], "abcd") is None
    assert before_stop(["abc", "bcd"], "xabcd") == "x"
    drawn = Completion((0, 0, 0), " an answer \n\nUser: ", "length", 9, 3, -2.0, [1, 2])
    cut = text_completion(drawn, ["User:"])
    assert (cut.text, cut.finish_reason, cut.tokens, cut.logprob, cut.ids) == ("an answer", "stop", 9, -2.0, [])
    whole = text_completion(drawn, ["nowhere"])
    assert (whole.text, whole.finish_reason, whole.ids) == ("an answer \n\nUser:", "length", [1, 2])
    assert text_completion(Completion((0, 0, 0), "a b", "tool_calls"), ["b"]).finish_reason == "tool_calls"
