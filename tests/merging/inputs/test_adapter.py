"""LoRA adapters against peft's own merge in float64, and refusals."""

import json
import re

import numpy as np
import pytest
from model_files import entries, read_model, safetensors_bytes, write_model

from gemma2.core.errors import InputError
from gemma2.merging.inputs.adapter import Factors, adapted_rows, check_adapter, is_adapter, load_factors, open_adapter
from gemma2.merging.inputs.checkpoint import Reader, open_checkpoint

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "some/base"}
Q = "model.layers.0.self_attn.q_proj"
RNG = np.random.default_rng(5)
PAIR = {f"{Q}.lora_A.weight": RNG.standard_normal((2, 8)), f"{Q}.lora_B.weight": RNG.standard_normal((8, 2))}


def write_adapter(path, arrays=PAIR, dtype="F32", prefix="base_model.model.", **config):
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    named = {prefix + name: np.asarray(array) for name, array in arrays.items()}
    (path / "adapter_model.safetensors").write_bytes(safetensors_bytes(entries(named, dtype)))
    return path


def applied(adapter, base):
    """Every tensor of the base with the adapter in it, fp64 views of fp32."""
    check_adapter(adapter, open_checkpoint(base, "base"))
    weights = {name: array.astype(np.float32) for name, array in read_model(base).items()}
    with Reader.open([adapter]) as reader:
        for name, tensor in adapter.replaced.items():
            raw = np.empty(tensor.nbytes, np.uint8)
            reader.read(tensor, 0, tensor.count, raw)
            weights[name] = raw.view(np.float32).reshape(tensor.shape)
        for name, update in adapter.updates.items():
            adapted_rows(weights[name].reshape(-1), load_factors(reader, update), 0)
    return weights


def base_model(path, width=8, seed=0):
    generator = np.random.default_rng(seed)
    arrays = {f"model.layers.{i}.self_attn.q_proj.weight": generator.standard_normal((width, 8)) for i in range(2)}
    return write_model(path, arrays | {"model.embed_tokens.weight": generator.standard_normal((16, 8))})


# --- against peft ---------------------------------------------------------------------------------------------------


def torch_model():
    """Modules with the names of a transformers decoder; biases, an embedding and a head included."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(8, 12)
            self.up_proj = torch.nn.Linear(8, 20, bias=False)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(16, 8)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(11))

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model()
            self.score = torch.nn.Linear(8, 1)

    torch.manual_seed(0)
    return Classifier()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Could not identify embedding")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["q_proj"], "use_rslora": True, "r": 3},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5, "layers.1.q_proj": 1}},
        {
            "target_modules": ["q_proj"],
            "alpha_pattern": {r"model.layers.\d.q_proj": 64, "q_proj": 2},
            "use_rslora": True,
        },
        {"target_modules": ["up_proj"], "modules_to_save": ["score"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=lambda config: " ".join(config),
)
def test_an_adapter_gives_what_pefts_own_merge_gives_in_float64(tmp_path, config):
    peft = pytest.importorskip("peft")
    import torch

    net = torch_model()
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    base = write_model(tmp_path / "base", arrays, config={"architectures": ["Gemma2ForSequenceClassification"]})
    model = peft.get_peft_model(net, peft.LoraConfig(**{"r": 4, "lora_alpha": 7} | config))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    expected = {name: value.numpy() for name, value in model.double().merge_and_unload().state_dict().items()}
    result = applied(open_adapter(tmp_path / "adapter", "model 1"), base)
    assert result.keys() == expected.keys()
    changed = [name for name, value in arrays.items() if not np.array_equal(value, expected[name].astype(np.float32))]
    assert len(changed) >= 11
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=0, atol=1e-6 * max(1, np.abs(value).max()), err_msg=name)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_one_update_agrees_with_a_calculation_by_hand(tmp_path):
    a, b = np.array([[1.0, 2, 0], [0, 1, 1]]), np.array([[1.0, 0], [3, 1]])
    adapter = open_adapter(write_adapter(tmp_path / "x", {"w.lora_A.weight": a, "w.lora_B.weight": b}), "model 1")
    update = adapter.updates["w.weight"]
    assert (update.scale, update.rank, update.shape, adapter.base_model_name) == (2.0, 2, (2, 3), "some/base")
    block = np.ones(6, np.float32)
    with Reader.open([adapter]) as reader:
        adapted_rows(block, load_factors(reader, update), 0)
    assert block.tolist() == [3, 5, 1, 7, 15, 3]  # 1 + 2 * [[1, 2, 0], [3, 7, 1]]


@pytest.mark.parametrize(
    ("pattern", "scale"), [("q_proj", 5.0), (r"layers\.\d\.self_attn\.q_proj", 5.0), ("proj", 2.0), ("self_attn", 2.0)]
)
def test_a_pattern_is_for_whole_parts_at_the_end_of_a_name(tmp_path, pattern, scale):
    path = write_adapter(tmp_path / "x", alpha_pattern={"up_proj": 1, pattern: 10, ".*": 4})
    assert open_adapter(path, "model 1").updates[f"{Q}.weight"].scale == scale


def test_fan_in_fan_out_transposes_the_product(tmp_path):
    arrays = {"w.lora_A.weight": RNG.standard_normal((2, 3)), "w.lora_B.weight": RNG.standard_normal((5, 2))}
    adapter = open_adapter(write_adapter(tmp_path / "x", arrays, fan_in_fan_out=True), "model 1")
    block = np.zeros((3, 5), np.float32)
    with Reader.open([adapter]) as reader:
        adapted_rows(block.reshape(-1), load_factors(reader, adapter.updates["w.weight"]), 0)
    a, b = arrays.values()
    np.testing.assert_allclose(block, 2 * (b @ a).T, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_factors_are_widened_exactly(tmp_path, dtype):
    arrays = {"w.lora_A.weight": np.array([[0.5, 1.5]] * 2), "w.lora_B.weight": np.array([[0.25, 2.0]])}
    adapter = open_adapter(write_adapter(tmp_path / "x", arrays, dtype), "model 1")
    block = np.zeros(2, np.float32)
    with Reader.open([adapter]) as reader:
        adapted_rows(block, load_factors(reader, adapter.updates["w.weight"]), 0)
    assert block.tolist() == [2 * 2.25 * 0.5, 2 * 2.25 * 1.5]


@pytest.mark.parametrize(("rank", "columns"), [(1, 5), (4, 33), (7, 4100), (16, 2048)])
def test_any_cut_gives_the_same_bits(rank, columns):
    generator = np.random.default_rng(rank)
    left = generator.standard_normal((6, rank)).astype(np.float32)
    right = generator.standard_normal((rank, columns)).astype(np.float32)
    factors, base = Factors(left, right, 0.37), generator.standard_normal(6 * columns).astype(np.float32)
    whole = base.copy()
    adapted_rows(whole, factors, 0)
    np.testing.assert_allclose(
        whole, base + (0.37 * (left.astype(float) @ right.astype(float))).reshape(-1), rtol=0, atol=2e-5
    )
    for size in (1 if columns < 50 else 997, 7 * columns // 3, 4096):
        parts = base.copy()
        for first in range(0, base.size, size):
            adapted_rows(parts[first : first + size], factors, first)
        assert parts.tobytes() == whole.tobytes()


# --- refused --------------------------------------------------------------------------------------------------------


def refusal(path, base=None):
    with pytest.raises(InputError) as caught:
        adapter = open_adapter(path, "model 1")
        if base:
            check_adapter(adapter, open_checkpoint(base, "base"))
        else:
            with Reader.open([adapter]) as reader:
                load_factors(reader, adapter.updates[f"{Q}.weight"])
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA, only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora to True: not plain LoRA; merge it into its base with peft"),
        ({"lora_bias": True}, "lora_bias to True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"use_something_of_2027": {"x": 1}}, "use_something_of_2027"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4, which changes the base as well"),
        ({"r": 3}, r"\[2, 8\] and \[8, 2\], not of rank 3 as in adapter_config.json"),
        ({"r": 0}, "r is 0, not a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha is 8, not a positive number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is 0"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has \(, not a regular expression"),
    ],
    ids=str,
)
def test_an_adapter_that_is_not_plain_lora_is_refused_naming_the_key(tmp_path, config, message):
    assert re.search(message, refusal(write_adapter(tmp_path / "x", **config)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({f"{Q}.lora_magnitude_vector": np.ones(8)}, f"{Q}.lora_magnitude_vector: that is DoRA"),
        ({f"{Q}.lora_B.bias": np.ones(8)}, f"{Q}.lora_B.bias: not a weight of plain LoRA"),
        ({f"{Q}.lora_A.default.weight": np.ones((2, 8))}, "lora_A.default.weight"),
        ({"extra.lora_A.weight": np.ones((2, 8))}, "extra has no lora_B"),
        ({f"{Q}.lora_B.weight": np.full((8, 2), np.nan)}, f"{Q}.lora_B.weight holds NaN or Inf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unknown_or_broken_tensor_is_refused_by_name(tmp_path, arrays, message):
    assert message in refusal(write_adapter(tmp_path / "x", PAIR | arrays))


def test_a_tensor_outside_pefts_layout_an_empty_file_and_a_pickle_are_refused(tmp_path):
    assert "not a weight of plain LoRA in peft's layout" in refusal(write_adapter(tmp_path / "x", prefix="model."))
    assert "is empty" in refusal(write_adapter(tmp_path / "y", {}))
    path = write_adapter(tmp_path / "z")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert "holds pickled weights only (adapter_model.bin)" in refusal(path)
    (path / "adapter_model.bin").unlink()
    assert "holds no adapter_model.safetensors" in refusal(path)


def test_an_adapter_for_another_base_is_refused_naming_both(tmp_path):
    adapter, other = write_adapter(tmp_path / "x"), base_model(tmp_path / "wide", width=12)
    message = refusal(adapter, other)
    assert f"is for a {Q}.weight of [8, 8], in base {other} it is [12, 8]" in message
    assert "give the model that it was trained on (some/base)" in message
    elsewhere = {name.replace("layers.0", "layers.7"): array for name, array in PAIR.items()}
    message = refusal(write_adapter(tmp_path / "y", elsewhere), other)
    assert f"changes model.layers.7.self_attn.q_proj.weight, which base {other} does not have" in message


def test_an_adapter_is_distinguished_from_a_model(tmp_path):
    assert is_adapter(write_adapter(tmp_path / "x"))
    assert not is_adapter(base_model(tmp_path / "base"))
