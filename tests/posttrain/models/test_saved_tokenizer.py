"""The files of a tokenizer that outputs carry from their parent."""

import os

from gemma2.posttrain.models.loading import load_policy, save_model
from gemma2.posttrain.models.lora import save_adapter
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer


def test_the_sentencepiece_model_of_the_parent_is_carried(tmp_path):
    """llama.cpp's converter takes the vocabulary of a Gemma 2 from this file alone; transformers drops it."""
    source = save_random(tmp_path / "parent")
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    model, tokenizer = load_policy(source)
    umask = os.umask(0o022)
    try:
        save_model(model, tokenizer, tmp_path / "child")
        (tmp_path / "adapter").mkdir()
        save_adapter(model, tokenizer, tmp_path / "adapter")
    finally:
        os.umask(umask)
    for name in ("child", "adapter"):
        assert (tmp_path / name / "tokenizer.model").read_bytes() == b"sentencepiece"
        assert (tmp_path / name / "tokenizer.model").stat().st_mode & 0o777 == 0o644
    grandchild, again = load_policy(tmp_path / "child")  # it loads as before
    save_model(grandchild, again, tmp_path / "grandchild")
    assert (tmp_path / "grandchild" / "tokenizer.model").exists()


def test_a_tokenizer_without_one_is_saved_as_it_is(tmp_path):
    save_model(random_model(), tiny_tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model" / "tokenizer.model").exists()
