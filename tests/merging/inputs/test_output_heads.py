"""Tied and separate output heads in every combination, read back and compared with numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
from model_files import added, entries, random_arrays, read_model, safetensors_bytes, write_model

from gemma2.core.errors import InputError
from gemma2.merging import MergeRequest, merge, plan_merge

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UNTIED = {"tie_word_embeddings": False}


def models(root, *heads, dtype="F32", shards=1, tied=None):
    """Models m-1, m-2, ... of one base; a head is None, "copy", or an array. Their tie is stated, or (None) absent."""
    base = random_arrays(0)
    for number, head in enumerate(heads, start=1):
        arrays = added(base, random_arrays(number, 0.1))
        extra = {} if head is None else {HEAD: arrays[EMBEDDING] if isinstance(head, str) else head}
        path = write_model(root / f"m-{number}", arrays | extra, dtype, shards=shards)
        config = json.loads((path / "config.json").read_text())
        config.pop("tie_word_embeddings")
        (path / "config.json").write_text(
            json.dumps(config if tied is None else config | {"tie_word_embeddings": tied})
        )
    return tuple(root / f"m-{number}" for number in range(1, len(heads) + 1))


def state(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def merged(root, paths, method="linear", **options):
    result = merge(MergeRequest(method=method, models=paths, **options), out=root / "out")
    return result, read_model(root / "out"), json.loads((root / "out/config.json").read_text())


@pytest.mark.parametrize("tied", [True, None], ids=["stated", "the default of Gemma 2"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("heads", [("copy", None), (None, "copy"), ("copy", "copy")])
@pytest.mark.parametrize("method", ["linear", "slerp", "karcher"])
def test_a_stored_copy_of_the_embedding_is_dropped_in_any_input(tmp_path, tied, shards, heads, method):
    plain = models(tmp_path / "plain", None, None, tied=tied)
    _, expected, _ = merged(tmp_path / "plain", plain, method)
    result, found, _ = merged(tmp_path, models(tmp_path, *heads, shards=shards, tied=tied), method)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert "lm_head.weight repeats model.embed_tokens.weight" in " ".join(result.plan.notes)


def test_a_stored_copy_is_dropped_from_a_stack_of_layers(tmp_path):
    from gemma2.merging.methods.request import Slice

    paths = models(tmp_path, "copy", None)
    slices = (Slice(layers=((0, 0, 1),)), Slice(layers=((1, 0, 2),)))
    _, found, _ = merged(tmp_path, paths, "passthrough", slices=slices)
    assert HEAD not in found


@pytest.mark.parametrize("tied", [True, None])
@pytest.mark.parametrize("position", [0, 1])
def test_a_stored_head_that_differs_from_its_tied_embedding_is_refused(tmp_path, tied, position):
    heads = [None, None]
    heads[position] = np.ones((16, 8))
    paths = models(tmp_path, *heads, tied=tied)
    with pytest.raises(InputError, match=rf"model {position + 1} .*lm_head.weight differs from model.embed_tokens"):
        merged(tmp_path, paths)
    assert not (tmp_path / "out").exists()


def test_a_tied_and_an_untied_model_are_refused_and_merged_when_allowed(tmp_path):
    first, second = models(tmp_path, None, np.ones((16, 8)))
    state(second, **UNTIED)
    message = rf"tie_word_embeddings differs: True in model 1 {first}, False in model 2 {second}; .*--allow-config tie_"
    with pytest.raises(InputError, match=message):
        plan_merge(MergeRequest(method="linear", models=(first, second)), tmp_path / "out")
    result, found, config = merged(tmp_path, (first, second), allow_config=("tie_word_embeddings",))
    np.testing.assert_allclose(found[HEAD], (read_model(first)[EMBEDDING] + 1) / 2, atol=1e-6)
    assert config["tie_word_embeddings"] is False
    assert "the output stores both (tie_word_embeddings: false)" in " ".join(result.plan.notes)


def test_an_untied_model_without_a_head_is_refused(tmp_path):
    paths = models(tmp_path, None, None, tied=False)
    with pytest.raises(InputError, match=r'no lm_head.weight, and its configuration does not tie .*"tie_word_embedd'):
        merged(tmp_path, paths)


# --- adapters of a tied model ---

RNG = np.random.default_rng(3)
LORA_HEAD = {
    "lm_head.lora_A.weight": RNG.standard_normal((2, 8)),
    "lm_head.lora_B.weight": RNG.standard_normal((16, 2)),
}
LORA_EMBEDDING = {
    "model.embed_tokens.lora_embedding_A": RNG.standard_normal((2, 16)),
    "model.embed_tokens.lora_embedding_B": RNG.standard_normal((8, 2)),
}
NEW = RNG.standard_normal((2, 16, 8)).astype(np.float32)


def adapter(path, arrays, base, **config):
    path.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(settings | config))
    named = {f"base_model.model.{name}": np.asarray(array) for name, array in arrays.items()}
    (path / "adapter_model.safetensors").write_bytes(safetensors_bytes(entries(named, "F32")))
    return path


def product(pair):
    a, b = pair.values()
    return 2.0 * (b @ a)


ADAPTERS = {
    "LoRA of the head": (LORA_HEAD, {}, lambda e: e, lambda e: e + product(LORA_HEAD)),
    "LoRA of the embedding": (LORA_EMBEDDING, {}, lambda e: e + product(LORA_EMBEDDING).T, lambda e: e),
    "both saved in full": (
        {EMBEDDING: NEW[0], HEAD: NEW[1]}, {"modules_to_save": ["embed_tokens", "lm_head"]},
        lambda e: NEW[0], lambda e: NEW[1],
    ),
    "embedding saved in full": (
        {EMBEDDING: NEW[0]}, {"modules_to_save": ["embed_tokens"]}, lambda e: NEW[0], lambda e: e,
    ),
}  # fmt: skip


@pytest.mark.parametrize("stored", [None, "copy"], ids=["tied", "stored copy"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_of_head_or_embedding_alone_unties_the_output(tmp_path, case, stored):
    arrays, config, embedding, head = ADAPTERS[case]
    base, other = models(tmp_path, stored, None)
    lora = adapter(tmp_path / "lora", arrays, base, **config)
    result, found, written = merged(tmp_path, (lora, other))
    start, tied = read_model(base)[EMBEDDING], read_model(other)[EMBEDDING]
    np.testing.assert_allclose(found[EMBEDDING], (embedding(start) + tied) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[HEAD], (head(start) + tied) / 2, rtol=1e-5, atol=1e-6)
    assert written["tie_word_embeddings"] is False
    assert "the adapter of model 1 changes lm_head.weight or its embedding alone" in " ".join(result.plan.notes)
    assert "tie_word_embeddings: false" in json.loads((tmp_path / "out/gemma2.json").read_text())["summary"]["notes"][0]


def test_an_adapter_that_keeps_the_tie_leaves_the_output_tied(tmp_path):
    base, _ = models(tmp_path, None, None)
    lora = adapter(tmp_path / "lora", LORA_EMBEDDING, base, ensure_weight_tying=True)
    _, found, written = merged(tmp_path, (lora,))
    assert HEAD not in found
    assert "tie_word_embeddings" not in written


def test_a_head_that_an_adapter_keeps_tied_has_its_update_where_another_one_unties(tmp_path):
    first, second = models(tmp_path, None, None)
    kept = adapter(tmp_path / "kept", LORA_EMBEDDING, first, ensure_weight_tying=True)
    apart = adapter(tmp_path / "apart", LORA_HEAD, second)
    _, found, _ = merged(tmp_path, (kept, apart))
    left, right = (read_model(path)[EMBEDDING] for path in (first, second))
    tied = left + product(LORA_EMBEDDING).T
    np.testing.assert_allclose(found[EMBEDDING], (tied + right) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[HEAD], (tied + right + product(LORA_HEAD)) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.is_gradient_checkpointing")
def test_the_merge_of_an_adapted_head_is_what_peft_and_transformers_compute(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = Gemma2ForCausalLM(Gemma2Config(vocab_size=20, head_dim=8, num_key_value_heads=1, **sizes))
    network.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    adapted = peft.get_peft_model(network, settings)
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "lora")
    ids = torch.arange(10)[None]
    expected = adapted(ids).logits
    named = Path(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    merge(MergeRequest(method="linear", models=(named,)), out=tmp_path / "out")
    loaded = Gemma2ForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-3, atol=1e-4)
