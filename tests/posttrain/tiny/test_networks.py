"""The embedded models: a real Gemma 2 in small, with Gemma 2's tokens."""

from __future__ import annotations

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gemma2.posttrain.tiny import networks
from gemma2.posttrain.tiny.networks import random_model, random_reward_model, save_random, tiny_tokenizer

DIALOGUE = [{"role": "user", "content": " What is 13 plus 8? "}, {"role": "assistant", "content": "It is 21."}]


def test_special_tokens_have_their_gemma_ids():
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    assert tiny_tokenizer().convert_tokens_to_ids(names) == [0, 1, 2, 3, 106, 107]


def test_tokenizer_fills_every_id_once():
    tokenizer = tiny_tokenizer()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_template_renders_gemma_turns_with_one_bos():
    expected = (
        "<bos><start_of_turn>user\nWhat is 13 plus 8?<end_of_turn>\n<start_of_turn>model\nIt is 21.<end_of_turn>\n"
    )
    assert tiny_tokenizer().apply_chat_template(DIALOGUE, tokenize=False) == expected


def test_template_opens_the_model_turn_for_generation():
    text = tiny_tokenizer().apply_chat_template(DIALOGUE[:1], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize("roles", [["system", "user"], ["assistant"], ["user", "user"]])
def test_template_refuses_what_gemma_refuses(roles):
    with pytest.raises(TemplateError):
        tiny_tokenizer().apply_chat_template([{"role": r, "content": "x"} for r in roles], tokenize=False)


@pytest.mark.parametrize(
    "text", ["What is 13 plus 8?", "  two  spaces\nand a line", "a_b {} ~ `x` <b>", "e d c, 4711."]
)
def test_printable_text_survives_a_round_trip(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_are_single_tokens():
    tokenizer = tiny_tokenizer()
    assert [t for t in tokenizer.tokenize("1234 56") if t != "▁"] == list("123456")


def test_training_the_tokenizer_again_gives_the_same_tokenizer():
    first = networks._backend()
    networks._backend.cache_clear()
    assert networks._backend() == first


def test_random_model_depends_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = random_model(3), random_model(3), random_model(4)
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert not torch.equal(first(ids).logits, other(ids).logits)
    assert torch.equal(state, torch.get_rng_state())


def test_sliding_window_cuts_the_first_layer_off_from_the_past():
    """With one (local) layer and a window of 8, the logits at position 9 cannot depend on position 0."""
    model = random_model(num_hidden_layers=1)
    ids = torch.arange(10, 20).unsqueeze(0)
    changed = ids.clone()
    changed[0, 0] = 300
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[7] > 0
    assert torch.equal(difference[8:], torch.zeros(2))


@pytest.mark.parametrize("kind", ["causal", "reward"])
def test_saved_models_load_in_transformers_as_they_are(tmp_path, kind):
    save_random(tmp_path, seed=5, kind=kind)
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    made = random_model(5) if kind == "causal" else random_reward_model(5)
    loaded = auto.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.arange(4, 14).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tiny_tokenizer().get_vocab()


def test_saved_generation_config_holds_both_stop_ids(tmp_path):
    save_random(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [1, 107]
