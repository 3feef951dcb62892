"""The `<bos>` of a row: one in front; a token that opens every turn may come as often as there are turns."""

import pytest

from gemma2.core.errors import GuardStop
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.tiny.networks import tiny_tokenizer
from gemma2.posttrain.training.one_row import check_bos

ASKED = [{"role": "user", "content": "Where?"}]
TALK = [*ASKED, {"role": "assistant", "content": "Here."}, *ASKED]


@pytest.fixture
def opening():
    """A tokenizer whose `<bos>` is the token that opens every turn, as SmolLM's `<|im_start|>`."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<start_of_turn>"
    tokenizer.chat_template = str(tokenizer.chat_template).replace("{{ bos_token }}", "").replace("{{bos_token}}", "")
    return ChatFormat(tokenizer)


@pytest.mark.parametrize("messages", [ASKED, TALK])
def test_a_token_that_opens_every_turn_may_be_the_bos(opening, messages):
    ids = opening.prompt_ids(messages)
    assert ids.count(opening.tokenizer.bos_token_id) == len(messages) + 1
    check_bos(opening, ids)


def test_two_of_them_in_a_row_are_refused(opening):
    ids = opening.prompt_ids(ASKED)
    with pytest.raises(GuardStop, match="a row has 3 <start_of_turn>"):
        check_bos(opening, [ids[0], *ids])


def test_a_row_that_begins_with_another_token_is_refused(opening):
    with pytest.raises(GuardStop, match="not one <start_of_turn>"):
        check_bos(opening, opening.prompt_ids(ASKED)[1:])


def test_a_second_bos_of_gemma_is_refused():
    chat = ChatFormat(tiny_tokenizer())
    ids = chat.prompt_ids(TALK)
    check_bos(chat, ids)
    with pytest.raises(GuardStop, match="a row has 2 <bos>"):
        check_bos(chat, [ids[0], *ids])
    with pytest.raises(GuardStop, match="a row has 0 <bos>"):
        check_bos(chat, ids[1:])
