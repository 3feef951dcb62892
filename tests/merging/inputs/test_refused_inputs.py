"""More refusals of a merge (see test_refusals.py): adapters, hub ids, slices, and numbers that make no sense."""

import json
from pathlib import Path

import numpy as np
import pytest
from faults import request, snapshot, write_models
from model_files import entries, read_model, safetensors_bytes, write_model

from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.merging import merge
from gemma2.merging.methods.request import Slice


@pytest.fixture
def root(tmp_path):
    return write_models(tmp_path)


def lora(root, **config):
    """An adapter of the first layer's attention next to the models."""
    path = root / "lora"
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(root / "rl-2")} | config
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    arrays = {f"{prefix}.lora_A.weight": np.ones((2, 64)), f"{prefix}.lora_B.weight": np.ones((64, 2))}
    (path / "adapter_model.safetensors").write_bytes(safetensors_bytes(entries(arrays, "F32")))
    return path


def refused(root, kind, message, method="linear", **options):
    before = snapshot(root)
    with pytest.raises(kind) as caught:
        merge(request(root, method, **options), out=root / "out")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "sets use_dora to True: not plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is IA3, only LORA can be merged here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base as well"),
        ({"r": 3}, "are [2, 64] and [64, 2], not of rank 3"),
        ({"a_key_of_tomorrow": 1}, "sets a_key_of_tomorrow to 1: not plain LoRA"),
    ],
)
def test_an_adapter_that_is_not_plain_lora(root, config, message):
    refused(root, InputError, message, models=(root / "rl-1", lora(root, **config)))


def test_an_adapter_whose_weights_are_pickled(root):
    path = lora(root)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    refused(root, InputError, "holds pickled weights only (adapter_model.bin)", models=(root / "rl-1", path))


def test_an_adapter_with_weights_that_are_not_finite(root):
    path = lora(root)
    data = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(data[:-4] + np.float32(np.nan).tobytes())
    refused(root, InputError, "lora_B.weight holds NaN or Inf", models=(root / "rl-1", path))


def test_an_adapter_of_another_model(root):
    wide = write_models(root / "wide", {"model.layers.0.self_attn.q_proj.weight": (96, 64)})
    pair = Path(f"{wide / 'rl-1'}+{lora(root)}")
    message = "is for a model.layers.0.self_attn.q_proj.weight of [64, 64], in model 2"
    refused(root, InputError, message, models=(root / "rl-1", pair))


def test_an_output_inside_an_adapter_or_its_model(root):
    path = lora(root)
    before = snapshot(root)
    for place in (path / "out", root / "rl-2" / "out"):
        with pytest.raises(OutputError, match="overlap"):
            merge(request(root, "linear", models=(root / "rl-1", path)), out=place, force=True)
    assert snapshot(root) == before


def test_a_hub_id_that_is_not_in_the_cache_while_offline(root, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "hub"))
    message = "model 2 nobody/nothing is not a directory here, it is not in the hub's cache"
    refused(root, InputError, message, models=(root / "rl-1", Path("nobody/nothing")))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Slice(layers=((0, 0, 3),)), "rl-1 has 2 layers, not [0, 3)"),
        (Slice(layers=((0, 1, 1),)), "slice 1 has sources of [0] layers"),
        (Slice(layers=((0, 0, 2), (1, 0, 1))), "slice 1 has sources of [1, 2] layers"),
        (Slice(layers=((0, -1, 1),)), "rl-1 has 2 layers, not [-1, 1)"),
        (Slice(layers=((0, 0, 1), (1, 0, 1)), changes={"weights": (1.0,)}), "1 weights for 2 models"),
    ],
)
def test_slices_that_do_not_exist_or_do_not_fit(root, part, message):
    refused(root, UsageError, message, slices=(part,))


def test_layers_that_cannot_be_stacked(root):
    arrays = {name: array for name, array in read_model(root / "rl-2").items() if "layers.1" not in name}
    write_model(root / "rl-2", arrays, "BF16")
    slices = (Slice(layers=((0, 0, 2),)), Slice(layers=((1, 1, 2),)))
    refused(root, UsageError, "rl-2 has 1 layers, not [1, 2)", slices=slices)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"weights": (0.2, 0.3, 0.5)}, "3 weights for 2 models"),
        ("ties", {"weights": (1.0,)}, "1 weights for 2 models"),
        ("ties", {"density": (0.1, 0.2, 0.3)}, "3 values of --density for 2 models"),
        ("ties", {"density": (1.5,)}, "--density 1.5 is not between 0 and 1"),
        ("breadcrumbs", {"gamma": (0.1, 0.2, 0.3)}, "3 values of --gamma for 2 models"),
        ("della", {"epsilon": (-0.1,)}, "--epsilon -0.1 is not between 0 and 1"),
        ("ties", {"weights": (1.0, float("inf"))}, "--weights holds a value that is not finite"),
        ("ties", {"rescale": True}, "merge ties does not take --rescale"),
        ("slerp", {"density": (0.5,)}, "merge slerp does not take --density"),
        ("ties", {"base": None}, "merge ties needs --base"),
        ("tiess", {}, "unknown merge method 'tiess'; did you mean 'ties'?"),
        ("", {}, "unknown merge method ''"),
        ("a\x1b[2J", {}, "unknown merge method"),
    ],
)
def test_numbers_and_methods_that_make_no_sense(root, method, options, message):
    refused(root, UsageError, message, method, **options)


def test_a_base_that_is_not_the_ancestor_gives_a_warning_with_the_figure(root):
    base = {name: -array for name, array in read_model(root / "base").items()}
    write_model(root / "base", base, "BF16")
    result = merge(request(root, "slerp"), out=root / "out")
    assert any("is the base its ancestor?" in line and any(c.isdigit() for c in line) for line in result.warnings)
