"""Adapters whose embedding is the head too: peft's two copies are one tensor of a tied base, and two of another."""

import numpy as np
from model_files import read_model, write_model
from test_adapter import write_adapter

from gemma2.merging.inputs.checkpoint import Reader
from gemma2.merging.inputs.resolve import open_input

BOTH = {"model.embed_tokens.weight": np.full((16, 8), 2.0), "lm_head.weight": np.full((16, 8), 2.0)}


def opened(root, arrays, **config):
    write_model(root / "base", arrays, config={"tie_word_embeddings": len(arrays) == 1})
    write_adapter(root / "adapter", BOTH, ensure_weight_tying=True, modules_to_save=["embed_tokens"], **config)
    return open_input(type(root)(f"{root / 'base'}+{root / 'adapter'}"), "model 1")


def test_a_tied_base_takes_one_of_the_two_copies(tmp_path):
    found = opened(tmp_path, {"model.embed_tokens.weight": np.ones((16, 8))})
    assert list(found.tensors) == ["model.embed_tokens.weight"]
    with Reader.open([found]) as reader:
        raw = np.empty(16 * 8 * 4, np.uint8)
        reader.read(found.tensors["model.embed_tokens.weight"], 0, 128, raw)
    assert (raw.view(np.float32) == 2).all()


def test_a_base_with_its_own_head_takes_both(tmp_path):
    found = opened(tmp_path, {name: np.ones((16, 8)) for name in BOTH})
    assert {tensor.file.parent.name for tensor in found.tensors.values()} == {"adapter"}
    assert set(read_model(tmp_path / "base")) == set(BOTH)


def test_a_head_alone_is_not_taken_for_a_copy(tmp_path):
    write_model(tmp_path / "base", {"model.embed_tokens.weight": np.ones((16, 8))})
    write_adapter(tmp_path / "adapter", {"lm_head.weight": np.ones((16, 8))}, ensure_weight_tying=True)
    found = open_input(type(tmp_path)(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"), "model 1")
    assert found.has_own_head and "lm_head.weight" in found.tensors
