"""Loading with the checks that transformers leaves to a warning, and saving what loads again."""

import ast
import json
import os
import stat

import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file, save_file

from gemma2.core.errors import InputError
from gemma2.posttrain.models.loading import (
    init_reward_model,
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_model,
)
from gemma2.posttrain.tiny.networks import random_model, random_reward_model, save_random, tiny_tokenizer

IDS = torch.tensor([[2, 106, 10, 20, 107]])  # (1, 5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("models") / "policy", seed=1)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("models") / "reward", seed=2, kind="reward")


@pytest.fixture
def broken(policy, tmp_path):
    """A copy of the policy to break: weights, and the files that loading needs."""

    def copy(source=policy):
        for path in source.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return copy


def change_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_policy_loads_with_its_weights_in_eager_attention_and_eval_mode(policy):
    model, tokenizer = load_policy(policy)
    expected = random_model(seed=1)
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert model.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0, atol=0)
    assert tokenizer.pad_token_id == 0


def test_the_attention_is_the_one_that_is_asked_for_whatever_the_file_says(broken):
    directory = broken()
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        change_config(directory, **{key: "sdpa"})
        assert load_policy(directory)[0].config._attn_implementation == "eager"


def test_every_loader_of_foreign_models_refuses_remote_code_in_words():
    """`trust_remote_code` left out asks at the terminal, or is what a later version makes of it."""
    calls = []
    for path in (file for layer in ("cli", "core", "merging", "posttrain") for file in (ROOT / layer).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func)
                if node.func.attr == "from_pretrained" and of != "GenerationConfig.from_pretrained":
                    calls.append(
                        (f"{path}:{node.lineno}", {word.arg: ast.unparse(word.value) for word in node.keywords})
                    )
    assert len(calls) >= 7
    assert not [place for place, words in calls if words.get("trust_remote_code") != "False"]


def test_a_policy_loads_in_the_requested_dtype(policy):
    assert load_policy(policy, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_reward_model_loads_with_its_head(reward):
    model, tokenizer = load_reward_model(reward)
    expected = random_reward_model(seed=2)
    expected.config.pad_token_id = 0
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0, atol=0)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert not model.training


def test_the_head_of_a_fresh_reward_model_follows_the_seed_and_its_body_the_policy(policy):
    first, again, other = (init_reward_model(policy, seed)[0] for seed in (5, 5, 6))
    assert first.score.weight.shape == (1, 16)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert torch.equal(first.model.norm.weight, random_model(seed=1).model.norm.weight)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "config.json").unlink(), r"holds no config\.json"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is not readable JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), r"holds no \*\.safetensors; convert"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), r"holds no \*\.safetensors"),
        (lambda d: change_config(d, auto_map={"AutoModel": "code.Model"}), r"requires its own code \(auto_map\)"),
        (lambda d: change_config(d, _attn_implementation="org/repo"), "chooses the implementation org/repo"),
        (lambda d: change_config(d, attn_implementation={"": "org/repo:f"}), "chooses the implementation org/repo:f"),
        (lambda d: change_config(d, text_config={"_attn_implementation": "o/r"}), "chooses the implementation o/r"),
        (lambda d: change_config(d, _experts_implementation="o/r"), "chooses the implementation o/r"),
        (lambda d: change_config(d, use_kernels=True), "asks for kernels of others"),
        (lambda d: (d / "tokenizer_config.json").write_text('{"auto_map": ["x.T", null]}'), "requires its own code"),
        (lambda d: change_config(d, model_type="nonsense"), "cannot be loaded as a model"),
        (lambda d: change_config(d, hidden_size=24), "cannot be loaded as a model"),
        (lambda d: os.truncate(d / "model.safetensors", 5000), r"model\.safetensors: the file is truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), r"model\.safetensors: header length"),
        (lambda d: change_weights(d, lambda w: w.pop("model.norm.weight")), r"lacks tensor model\.norm\.weight"),
        (lambda d: change_weights(d, lambda w: w.update(stray=torch.ones(2))), "has the unknown tensor stray"),
        (lambda d: change_config(d, architectures=["Gemma2ForSequenceClassification"]), "is a reward model, not a"),
        (lambda d: [path.unlink() for path in d.glob("tokenizer*")], "holds no tokenizer; copy"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "no tokenizer can be loaded"),
    ],
)
def test_a_directory_that_is_not_a_policy_is_refused_in_one_line_with_the_reason(broken, damage, said):
    directory = broken()
    damage(directory)
    with pytest.raises(InputError, match=said) as caught:
        load_policy(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_missing_tensors_are_counted(broken):
    directory = broken()
    change_weights(directory, lambda w: [w.pop(name) for name in list(w) if "layers.1." in name])
    with pytest.raises(InputError, match=r"lacks tensor model\.layers\.1\..* and \d+ more"):
        load_policy(directory)


def test_a_reward_model_and_a_policy_are_not_confused(policy, reward, broken):
    with pytest.raises(InputError, match="is not a reward model; train one"):
        load_reward_model(policy)
    with pytest.raises(InputError, match="is a reward model, not a language model"):
        load_policy(reward)
    two = broken(reward)
    change_weights(two, lambda w: w.update({"score.weight": torch.ones(2, 16)}))
    change_config(two, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(InputError, match="has 2 outputs; a reward model has one"):
        load_reward_model(two)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_the_pad_token_is_never_the_one_that_ends_a_completion(broken, pad):
    directory = broken()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.pad_token == "<pad>"


def test_a_tokenizer_without_a_pad_token_pads_with_a_token_that_is_never_generated(broken):
    directory = broken()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    vocabulary = directory / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("<pad>", "<blank>"))
    assert load_tokenizer(directory).pad_token == "<unk>"


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_a_saved_model_loads_again_and_has_the_modes_of_the_umask(policy, tmp_path, mask):
    model, tokenizer = load_policy(policy)
    before = os.umask(mask)
    try:
        save_model(model, tokenizer, tmp_path)
        left = os.umask(mask)
    finally:
        os.umask(before)
    assert left == mask
    again, tokens = load_policy(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.generation_config.eos_token_id == [1, 107], "both ends of a model turn"
    assert tokens.chat_template == tiny_tokenizer().chat_template
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.bin")), "no pickles"
