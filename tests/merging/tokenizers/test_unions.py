"""The tokenizer of the output: choices, refusals, and unions of added tokens that transformers can load."""

import json

import numpy as np
import pytest
from model_files import SHAPES, added, random_arrays, read_model, write_model
from tokenizer_models import EMBEDDING, FLAGS, LETTERS, arrays, config_of, merged, model, write_tokenizer

from gemma2.core.errors import InputError, UsageError
from gemma2.merging.methods.request import Slice

# --- choices ---


@pytest.mark.parametrize("choice", ["base", "union", "path"])
def test_a_choice_among_equal_tokenizers_changes_nothing(tmp_path, choice):
    base = arrays(0)
    for number, name in enumerate(("base", "a", "b")):
        path = model(tmp_path / name, added(base, arrays(number, scale=0.1)), LETTERS, [("<x>", 10)], dtype="BF16")
        (path / "generation_config.json").write_text('{"eos_token_id":   10}')
    options = {"method": "slerp", "base": tmp_path / "base"}
    _, plain = merged(tmp_path, "a", "b", out="plain", **options)
    chosen = choice if choice != "path" else str(tmp_path / "b")
    result, out = merged(tmp_path, "a", "b", tokenizer=chosen, **options)
    assert result.plan.notes == ()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()


def refused(root, kind, message, *names, **options):
    before = sorted(root.rglob("*"))
    with pytest.raises(kind) as caught:
        merged(root, *names, **options)
    assert message in str(caught.value)
    assert sorted(root.rglob("*")) == before


@pytest.fixture
def pair(tmp_path):
    model(tmp_path / "a", arrays(1, 11), LETTERS, [("<x>", 10)])
    model(tmp_path / "b", arrays(2, 11), LETTERS, [("<y>", 10)])
    return tmp_path


def test_without_a_choice_tokenizers_must_be_equal(pair):
    refused(pair, InputError, "choose a tokenizer with merge --tokenizer", "a", "b")
    model(pair / "b", arrays(2, 12), LETTERS, [("<y>", 11)])
    refused(pair, InputError, "choose one: merge --tokenizer", "a", "b")


def test_the_tokenizer_of_a_base_needs_a_base(pair):
    refused(pair, UsageError, "--tokenizer base: this merge has no base", "a", "b", tokenizer="base")


def test_the_tokenizer_of_another_model_is_refused(pair):
    refused(pair, UsageError, "--tokenizer c is not one of the inputs", "a", "b", tokenizer="c")


def test_a_choice_needs_fast_tokenizers(pair):
    (pair / "b/tokenizer.json").rename(pair / "b/tokenizer.model")
    refused(pair, InputError, f"model 2 {pair / 'b'} has no tokenizer.json", "a", "b", tokenizer="union")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {}}', "holds no vocabulary"),
        ('{"model": {"vocab": {"a": 0, "b": 0}}}', "gives the id 0 to 2 tokens"),
        ('{"model": {"vocab": {"a": -1}}}', "'a' has the id -1"),
        ('{"model": {"vocab": {"a": "0"}}}', "'a' has the id 0"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "added_tokens is malformed"),
        ('{"model": {"vocab": [["a"]]}}', "holds no vocabulary"),
        ('{"model": {"vocab": [[["a"], 1]]}}', "holds no vocabulary"),
        ('{"model": {"vocab": {"a": 0}, "merges": [3]}}', "holds no vocabulary"),
        ("[]", "is not a JSON object"),
    ],
)
def test_malformed_tokenizers_are_refused(pair, text, message):
    (pair / "b/tokenizer.json").write_text(text)
    refused(pair, InputError, message, "a", "b", tokenizer="union")


def test_differences_other_than_the_vocabulary_are_still_refused(pair):
    model(pair / "b", random_arrays(2, 1.0, SHAPES | {EMBEDDING: (11, 9)}), LETTERS, [("<y>", 10)])
    refused(pair, InputError, "hidden_size differs: 8 in model 1", "a", "b", tokenizer="union")
    model(pair / "b", random_arrays(2, 1.0, SHAPES | {"model.norm.weight": (11,)}), LETTERS)
    refused(pair, InputError, "model.norm.weight is [8]", "a", "b", tokenizer="union")


# --- unions ---


def test_a_union_has_the_rows_of_all_tokens(pair):
    left, right = read_model(pair / "a")[EMBEDDING], read_model(pair / "b")[EMBEDDING]
    result, out = merged(pair, "a", "b", tokenizer="union")
    found = read_model(out)[EMBEDDING]
    np.testing.assert_allclose(found[:10], (left[:10] + right[:10]) / 2, atol=1e-6)
    np.testing.assert_array_equal(found[10:], [left[10], right[10]])  # each token is in one model only
    assert config_of(out)["vocab_size"] == 12
    entries = config_of(out, "tokenizer.json")["added_tokens"]
    assert [(entry["content"], entry["id"], entry["special"]) for entry in entries] == [
        ("<x>", 10, True),
        ("<y>", 11, True),
    ]
    assert result.plan.notes == (
        "tokenizer of model 1 with 1 token added: id 11",
        "model 1: 1 token taken from model 2",
        "model 2: 1 token mapped, 1 token taken from model 1",
    )


def test_new_tokens_use_rows_without_a_token_before_rows_are_added(tmp_path):
    model(tmp_path / "a", arrays(1, 12))  # rows 10 and 11 are free
    model(tmp_path / "b", arrays(2, 13), LETTERS, [("<p>", 10), ("<q>", 11), ("<r>", 12)])
    right = read_model(tmp_path / "b")[EMBEDDING]
    _, out = merged(tmp_path, "a", "b", tokenizer="union")
    np.testing.assert_array_equal(read_model(out)[EMBEDDING][10:], right[10:])
    assert config_of(out)["vocab_size"] == 13
    model(tmp_path / "c", arrays(3, 11), LETTERS, [("<p>", 10)])
    result, out = merged(tmp_path, "a", "c", tokenizer="union", out="fits")
    assert read_model(out)[EMBEDDING].shape == (12, 8) and "vocab_size" not in result.plan.config


def test_a_core_token_that_another_model_flags_keeps_its_row(tmp_path):
    model(tmp_path / "a", arrays(1, 10))
    model(tmp_path / "b", arrays(2, 10), LETTERS, [("c", 2)])
    result, out = merged(tmp_path, "a", "b", tokenizer="union")
    assert config_of(out, "tokenizer.json")["added_tokens"] == [{"id": 2, "content": "c"} | FLAGS]
    assert read_model(out)[EMBEDDING].shape == (10, 8) and result.plan.notes == ()


def test_new_ids_begin_after_the_core_even_if_the_added_tokens_are_inside_it(tmp_path):
    model(tmp_path / "a", arrays(1, 10), LETTERS, [("c", 2)])
    model(tmp_path / "b", arrays(2, 11), LETTERS, [("c", 2), ("<y>", 10)])
    _, out = merged(tmp_path, "a", "b", tokenizer="union")
    assert [entry["id"] for entry in config_of(out, "tokenizer.json")["added_tokens"]] == [2, 10]


def test_an_added_entry_of_a_core_token_has_the_core_id(tmp_path):
    """The tokenizers library does the same, whatever id the entry states."""
    model(tmp_path / "a", arrays(1, 10))
    model(tmp_path / "b", arrays(2, 10), LETTERS, [("c", 9_999)])
    result, _ = merged(tmp_path, "a", "b", tokenizer=str(tmp_path / "a"))
    assert result.plan.notes == () and result.plan.request.tokenizer == "model 1"


def test_of_flags_that_disagree_the_first_input_s_are_kept(pair):
    write_tokenizer(pair / "b", LETTERS, [("<x>", 10)], special=False)
    result, out = merged(pair, "a", "b", tokenizer="union")
    assert result.plan.notes == ("<x> has other flags in model 2: the first ones are kept",)
    assert config_of(out, "tokenizer.json")["added_tokens"][0]["special"] is True


def test_a_union_of_different_cores_is_refused(pair):
    message = "have different vocabularies or merges, which have no union"
    write_tokenizer(pair / "b", LETTERS, [("<y>", 10)], merges=["a b"])
    refused(pair, InputError, message, "a", "b", tokenizer="union")
    write_tokenizer(pair / "b", LETTERS[::-1], [("<y>", 10)])
    refused(pair, InputError, message, "a", "b", tokenizer="union")


def test_merges_in_another_spelling_are_the_same_core(pair):
    write_tokenizer(pair / "a", LETTERS, [("<x>", 10)], merges=["a b"])
    write_tokenizer(pair / "b", LETTERS, [("<y>", 10)], merges=[["a", "b"]])
    merged(pair, "a", "b", tokenizer="union")


def test_a_union_without_a_free_id_is_refused(pair):
    holes = {token: 2 * index for index, token in enumerate("abcde")}  # five tokens: the sixth would be id 5, then 6
    write_tokenizer(pair / "a", holes)
    write_tokenizer(pair / "b", holes, [("<y>", 7), ("<z>", 9)])
    refused(
        pair, InputError, "cannot add a token with id 5: its ids have holes (6 is in use)", "a", "b", tokenizer="union"
    )
    write_tokenizer(pair / "a", LETTERS, [("<x>", 10**12)])
    write_tokenizer(pair / "b", LETTERS, [("<y>", 10)])
    refused(pair, InputError, "its embedding ends at row 11", "a", "b", tokenizer="union")


def test_the_other_tokenizer_files_are_extended_if_they_exist(pair):
    (pair / "a/added_tokens.json").write_text('{"<x>": 10}')
    flags = {"content": "<x>"} | FLAGS
    (pair / "a/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"10": flags}, "pad": 1}))
    (pair / "b/chat_template.jinja").write_text("b")
    _, out = merged(pair, "b", "a", tokenizer="union", method="task-arithmetic", base=pair / "a")
    assert config_of(out, "added_tokens.json") == {"<x>": 10, "<y>": 11}
    decoder = {"10": flags, "11": {"content": "<y>"} | FLAGS}
    assert config_of(out, "tokenizer_config.json") == {"added_tokens_decoder": decoder, "pad": 1}
    assert not (out / "chat_template.jinja").exists()  # the tokenizer is not model 1's, whose template it was


def test_a_chat_template_that_is_lost_with_its_tokenizer_is_named(pair):
    (pair / "b/chat_template.jinja").write_text("b")
    result, _ = merged(pair, "b", "a", tokenizer=str(pair / "a"))
    lost = "no chat template: that of model 1 is not taken with the tokenizer of model 2"
    assert result.plan.notes[-1] == lost and result.summary["notes"][-1] == lost
    (pair / "a/tokenizer_config.json").write_text('{"chat_template": "a"}')
    result, _ = merged(pair, "b", "a", tokenizer=str(pair / "a"), out="kept")
    assert lost not in result.plan.notes


def test_token_ids_in_the_configuration_follow_their_tokens(pair):
    write_model(pair / "b", arrays(2, 11), config={"vocab_size": 11, "eos_token_id": 10, "pad_token_id": 3})
    (pair / "b/generation_config.json").write_text('{"eos_token_id": [1, 10], "max_new_tokens": 10}')
    (pair / "a/generation_config.json").write_text('{"eos_token_id": 2}')
    _, out = merged(pair, "b", "a", tokenizer="union", base=pair / "a", method="task-arithmetic")
    assert config_of(out)["eos_token_id"] == 11 and config_of(out)["pad_token_id"] == 3
    assert config_of(out, "generation_config.json") == {"eos_token_id": [1, 11], "max_new_tokens": 10}
    _, out = merged(pair, "b", "a", tokenizer=str(pair / "a"), out="chosen")  # <y> is not a token of a
    assert config_of(out)["eos_token_id"] is None
    assert config_of(out, "generation_config.json")["eos_token_id"] == [1]


def tiny_llama(path, tokens, seed):
    """A random Llama with a trained byte-level tokenizer that has `tokens` added."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the rows follow their tokens, the tokens follow their rows"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes))
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return network, tokenizer


def test_transformers_loads_a_union_and_knows_the_new_tokens(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_llama(tmp_path / "base", [], 0)
    left, one = tiny_llama(tmp_path / "a", ["<tool>"], 1)
    right, other = tiny_llama(tmp_path / "b", ["<think>", "<tool>"], 2)
    options = {"method": "task-arithmetic", "base": tmp_path / "base", "weights": (0.5, 0.5)}
    _, out = merged(tmp_path, "a", "b", tokenizer="union", **options)
    tokenizer, network = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    size = len(one) - 1
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<think>"]) == [size, size + 1]
    ids = tokenizer("the rows<think> follow<tool>", return_tensors="pt")
    assert ids["input_ids"][0, -1] == size and size + 1 in ids["input_ids"][0]
    assert tokenizer.decode(ids["input_ids"][0]) == "the rows<think> follow<tool>"
    assert tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True) == "the rows follow"
    logits = network(**ids).logits
    assert logits.shape[-1] == size + 2 == network.config.vocab_size and torch.isfinite(logits).all()
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        found, a, b = (getattr(item, layer)().weight.detach() for item in (network, left, right))
        # The base has a's row of <tool>, the only token that both models added; only b has <think>.
        torch.testing.assert_close(found[size], (a[size] + b[other.convert_tokens_to_ids("<tool>")]) / 2)
        # base and a have b's row: no task vector at all.
        torch.testing.assert_close(found[size + 1], b[other.convert_tokens_to_ids("<think>")])


# --- slices ---


def test_stacked_layers_take_the_chosen_vocabulary_too(pair):
    slices = (Slice(layers=((0, 0, 1),)), Slice(layers=((1, 1, 2),)))
    _, out = merged(pair, "a", "b", method="passthrough", slices=slices, tokenizer="union")
    left, right = read_model(pair / "a"), read_model(pair / "b")
    np.testing.assert_array_equal(read_model(out)[EMBEDDING], [*left[EMBEDDING], right[EMBEDDING][10]])
    assert config_of(out)["num_hidden_layers"] == 2 and config_of(out)["vocab_size"] == 12
    assert (
        read_model(out)["model.layers.1.mlp.up_proj.weight"].tolist()
        == right["model.layers.1.mlp.up_proj.weight"].tolist()
    )
