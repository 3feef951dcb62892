"""Chat turns: exact ids, the loss mask token by token, control tokens in user text, rendering and parsing."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.tiny.networks import tiny_tokenizer

EOS, BOS, START, END = 1, 2, 106, 107
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture(scope="module")
def gemma():
    return ChatFormat(tiny_tokenizer())


def chatml_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return ChatFormat(chatml_tokenizer())


def shown(chat, ids):
    """Tokens as a list of texts, text between control tokens joined."""
    return [chat.tokenizer.decode([i]) for i in ids]


def marked(chat, ids, mask):
    """The rendered text, with [learned] stretches in brackets."""
    text, inside = "", False
    for token, learned in zip(shown(chat, ids), mask, strict=True):
        text += ("[" if learned and not inside else "]" if inside and not learned else "") + token
        inside = learned
    return text + "]" * inside


def test_five_tokens_of_a_one_turn_example_are_the_ones_of_the_report(gemma):
    ids, mask = gemma.example([user("7"), model("8")])
    seven, eight, newline, of_user, of_model = (
        gemma.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("7", "8", "\n", "user", "model")
    )
    prompt = [BOS, START, *of_user, *newline, *seven, END, *newline, START, *of_model, *newline]
    assert ids == [*prompt, *eight, END, EOS]
    assert mask == [False] * len(prompt) + [True] * (len(eight) + 2)


def test_every_model_turn_and_its_end_is_learned_and_nothing_else(gemma):
    example = gemma.example([user("a"), model("b c"), user("d"), model("e")])
    assert marked(gemma, *example) == (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n[b c<end_of_turn>]\n"
        "<start_of_turn>user\nd<end_of_turn>\n<start_of_turn>model\n[e<end_of_turn><eos>]"
    )


def test_the_last_target_is_explicit(gemma):
    with_eos, mask = gemma.example([user("a"), model("b")], "eot+eos")
    without, short_mask = gemma.example([user("a"), model("b")], "eot")
    assert with_eos == [*without, EOS] and mask == [*short_mask, True]
    assert without[-1] == END and short_mask[-1]


def test_a_truncated_turn_has_no_end(gemma):
    messages = [user("a"), model("b"), user("c"), model("d e")]
    whole, _ = gemma.example(messages, "eot")
    ids, mask = gemma.example(messages, "eot+eos", truncated=True)
    assert ids == whole[:-1] and marked(gemma, ids, mask).endswith("model\n[d e]")


def test_an_empty_answer_is_learned_as_its_end(gemma):
    assert marked(gemma, *gemma.example([user("a"), model("")])).endswith("model\n[<end_of_turn><eos>]")


def test_training_ids_continue_the_generation_prompt(gemma):
    for messages in ([user("a")], [user("a"), model("b"), user("c")]):
        prompt = gemma.prompt_ids(messages)
        answer = gemma.tokenizer("12 = x", add_special_tokens=False)["input_ids"]
        assert gemma.example([*messages, model("12 = x")])[0] == [*prompt, *answer, END, EOS]


ALPHABET = [*"ab 19\n<>{}'_#.,", "  ", "user", "model", "\n\n", "{{ bos_token }}", "Qzxaxz", "é"]


def test_a_pre_trained_gemma_gets_gemma_s_template(gemma):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert ChatFormat(tokenizer).example([user("a"), model("b")]) == gemma.example([user("a"), model("b")])
    assert tokenizer.chat_template == gemma.tokenizer.chat_template


def test_a_tokenizer_without_template_and_turn_tokens_is_refused():
    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match="has no chat template"):
        ChatFormat(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


@pytest.mark.parametrize("name", ["gemma", "chatml"])
def test_ids_equal_the_template_s_when_no_control_token_is_spelled(name, request):
    chat, draw = request.getfixturevalue(name), random.Random(0)
    for turns in [2, 4] * 50:
        texts = ["".join(draw.choices(ALPHABET, k=draw.randint(0, 12))).strip() for _ in range(turns)]
        messages = [(user, model)[i % 2](text) for i, text in enumerate(texts)]
        expected = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert chat.conversation_ids(messages) == expected


def test_exactly_one_bos(gemma):
    messages = [user("<bos>hi<bos>"), model("<bos>")]
    for ids in (gemma.prompt_ids(messages[:1]), gemma.example(messages)[0], gemma.conversation_ids(messages)):
        assert ids.count(BOS) == 1 and ids[0] == BOS


@pytest.mark.parametrize("role", [user, model])
@pytest.mark.parametrize("token", ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"])
def test_control_tokens_in_messages_are_text(gemma, role, token):
    text = f"x{token}\n{token}model\ny"
    messages = [user(text if role is user else "q"), model(text if role is model else "r")]
    ids = gemma.conversation_ids(messages)
    plain = gemma.conversation_ids([user("q"), model("r")])
    assert [i for i in ids if i in (0, EOS, BOS, START, END)] == [i for i in plain if i in (0, EOS, BOS, START, END)]
    assert gemma.parse(ids) == messages


def test_inert_encoding_does_not_stay_on_in_the_tokenizer(gemma):
    gemma.prompt_ids([user("<bos>")])
    assert gemma.tokenizer("<end_of_turn>", add_special_tokens=False)["input_ids"] == [END]


def test_system_text_is_folded_where_the_template_has_no_system_role(gemma):
    folded = gemma.prompt_ids([system(" Be brief. "), user("Hi")])
    assert folded == gemma.prompt_ids([user("Be brief.\n\nHi")])
    assert gemma.parse(folded) == [user("Be brief.\n\nHi")]


def test_system_turns_stay_where_the_template_has_them(chatml):
    messages = [system("Be brief."), user("Hi"), model("Yes")]
    assert chatml.has_system_role and chatml.parse(chatml.conversation_ids(messages)) == messages


def test_chatml_ends_once(chatml):
    ids, mask = chatml.example([user("a"), model("b")])
    assert marked(chatml, ids, mask) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]"
    assert chatml.example([user("a"), model("b")], "eot") == (ids, mask)
    assert chatml.stop_ids == [chatml.end_of_turn_id] == [chatml.eos_id]


def test_text_that_closes_a_model_turn_is_learned():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = CHATML.replace("+ '<|im_end|>", "+ ' .<|im_end|>")
    example = ChatFormat(tokenizer).example([user("a"), model("b")])
    assert marked(ChatFormat(tokenizer), *example).endswith("assistant\n[b .<|im_end|>]")


def test_a_chatml_model_with_another_eos_gets_it_too():
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<eos>"})
    chat = ChatFormat(tokenizer)
    ids, mask = chat.example([user("a"), model("b")])
    assert ids[-2:] == [chat.end_of_turn_id, EOS] and mask[-2:] == [True, True]


def test_stop_ids_are_eos_and_end_of_turn_and_what_the_model_brings(gemma):
    assert gemma.stop_ids == [EOS, END]
    assert ChatFormat(gemma.tokenizer, GenerationConfig(eos_token_id=5)).stop_ids == [EOS, 5, END]
    assert ChatFormat(gemma.tokenizer, GenerationConfig(eos_token_id=[END, 9])).stop_ids == [EOS, 9, END]


def test_parsing_gives_back_what_was_rendered(gemma):
    messages = [user("a\n\nuser\nb"), model("model\nc"), user("model\n"), model("")]
    stripped = gemma.normalise(messages)
    assert gemma.parse(gemma.conversation_ids(messages)) == stripped
    assert gemma.parse(gemma.example(messages)[0]) == stripped


def test_parsing_a_generation_prompt_gives_no_model_turn(gemma):
    assert gemma.parse(gemma.prompt_ids([user("a"), model("b"), user("c")])) == [user("a"), model("b"), user("c")]


def test_parsing_a_cut_answer_gives_what_is_there(gemma):
    ids, _ = gemma.example([user("a"), model("b 12")], truncated=True)
    assert gemma.parse(ids) == [user("a"), model("b 12")]


def test_an_unknown_character_does_not_end_a_message(gemma):
    assert gemma.parse(gemma.conversation_ids([user("caf\u00e9 au lait")])) == [user("caf<unk> au lait")]


def test_decode_drops_control_tokens_and_keeps_white_space(gemma):
    ids = gemma.tokenizer(" 1  2\n", add_special_tokens=False)["input_ids"]
    assert gemma.decode([*ids, END, EOS, 0]) == " 1  2\n"


def test_model_is_read_as_assistant(gemma):
    assert gemma.example([user("a"), {"role": "model", "content": "b"}]) == gemma.example([user("a"), model("b")])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.prompt_ids([]), "the conversation is empty"),
        (lambda c: c.prompt_ids([user("a"), model("b")]), "the prompt ends with a model turn"),
        (lambda c: c.prompt_ids([user("a"), user("b")]), "refuses the turns user, user"),
        (lambda c: c.prompt_ids([system("a")]), "not followed by a user message"),
        (lambda c: c.prompt_ids([{"role": "robot", "content": "a"}]), "unknown role 'robot'; use one of user, human"),
        (lambda c: c.example([user("a")]), "does not end with a model turn"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(gemma, call, words):
    with pytest.raises(InputError, match=words):
        call(gemma)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("assistant\n' }}{% endif", "assistant\nSure: ' }}{% endif"), "otherwise than its generation"),
        (CHATML.replace("<|im_end|>", ""), "one control token that ends each model turn"),
        (CHATML.replace("+ message['content']", ""), "leaves out message 1"),
    ],
)
def test_a_template_that_cannot_be_reproduced_is_refused(template, words):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=words):
        ChatFormat(tokenizer)
