"""`--base-bits`: what is quantised, what it is compared with, what the anchors and the written models are made of."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_decoder import made, stepped
from test_sampler import PAD, STOP, generate, prompts_of

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.adapters import frozen_base as bases
from gemma2.posttrain.adapters import merged_output
from gemma2.posttrain.adapters.frozen_base import load_trained
from gemma2.posttrain.adapters.merged_output import is_rounded, products_of, write_merged
from gemma2.posttrain.adapters.output_difference import policy_difference
from gemma2.posttrain.models.decoder import StepDecoder
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.lora import sharing_copy
from gemma2.posttrain.models.precision import as_loaded, rounded_copy, trained_weights
from gemma2.posttrain.models.sampler import SamplingParams, sample
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.quantisation.convert import quantise, quantised_layers
from gemma2.posttrain.quantisation.quantised_linear import QuantisedLinear, dequantised
from gemma2.posttrain.rl.ema import FactorAnchor, LoraAnchor
from gemma2.posttrain.rl.vllm import PlainWeights
from gemma2.posttrain.schemas import LoraFields
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
CPU = torch.device("cpu")
FAMILIES = ["gemma 2", "gemma 2 with biases and silu", "llama 3, biases, tied", "qwen 3"]


class Notes:
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def adapted(model, seed=0, scale=0.05, targets="all-linear"):
    """The network with adapters whose products are not 0, inside peft's wrapper."""
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, scale, generator=generator)
    return wrapped


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_are_quantised_and_nothing_else(name, bits):
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = quantise(model, bits, CPU)
    found = dict(quantised_layers(model))
    assert len(found) == error.matrices == 7 * model.config.num_hidden_layers
    assert all(".layers." in layer for layer in found)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    kept = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in found}
    assert all(torch.equal(value, before[key]) for key, value in kept.items())
    square = sum(float((dequantised(layer) - before[f"{key}.weight"]).square().sum()) for key, layer in found.items())
    size = sum(float(before[f"{key}.weight"].square().sum()) for key in found)
    assert error.relative == pytest.approx((square / size) ** 0.5, rel=1e-3)
    assert error.relative <= error.worst < {4: 0.15, 8: 0.01}[bits]
    assert error.bytes == sum(layer.stored_bytes() for layer in found.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_takes_quantised_layers_as_they_are(name, bits, monkeypatch):
    """The logits of transformers' forward pass on the same layers, with adapters; no weight is formed beforehand."""
    policy = adapted_base(name, bits)
    assert StepDecoder.fits(policy)
    monkeypatch.setattr("gemma2.posttrain.models.decoder_blocks.weight_of", None)  # would be called for a copy
    expected = stepped(policy, "transformers")
    assert (stepped(policy, "decoder") - expected).abs().max() < 5e-5 * expected.std()
    prompts = prompts_of([5, 3, 11])
    assert sample(policy, prompts, SamplingParams(12, temperature=0.0), [STOP], PAD).ids == generate(
        policy, prompts, 12
    )


def adapted_base(name, bits):
    model = made(name)
    quantise(model, bits, CPU)
    return adapted(model).get_base_model()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_does_not_come_back_is_refused(bits, monkeypatch):
    model = made("gemma 2")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj has a relative error of nan in"):
        quantise(model, bits, CPU)
    model = made("gemma 2")
    monkeypatch.setattr(QuantisedLinear, "dequantised", lambda self: torch.zeros(self.out_features, self.in_features))
    with pytest.raises(InputError, match="error of 1 in"):  # a kernel that is broken
        quantise(model, bits, CPU)


def test_without_bitsandbytes_four_bits_are_one_line_and_eight_work(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed") as refused:
        bases.check_base(LoraFields(lora_rank=2, base_bits=4))
    assert refused.value.hint == "pip install 'gemma2[quant]'"
    bases.check_base(LoraFields(lora_rank=2, base_bits=8))
    quantise(made("gemma 2"), 8, CPU)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bases") / "model"
    save_random(path, 3)
    return path


@pytest.fixture(params=[4, 8])
def loaded(request, directory):
    notes = Notes()
    model, tokenizer = load_trained(directory, LoraFields(lora_rank=3, base_bits=request.param), notes)
    return model, tokenizer, notes, request.param


def test_loading_says_once_how_far_the_base_is_from_its_directory(loaded, directory):
    model, _, notes, bits = loaded
    (note,) = notes.notes
    count = 7 * model.config.num_hidden_layers
    assert note.startswith(f"{directory}: {count} matrices in {bits} bits: relative error 0.")
    plain, _ = load_trained(directory, LoraFields(), notes)
    assert not list(quantised_layers(plain))
    assert len(notes.notes) == 1


def test_the_base_is_shared_by_reference_policy_and_both_anchors(loaded):
    model, *_ = loaded
    base = sharing_copy(model).requires_grad_(False)
    policy = adapted(model).get_base_model()
    packed = {layer.weight.data_ptr() for _, layer in quantised_layers(policy)}
    assert {layer.weight.data_ptr() for _, layer in quantised_layers(base)} == packed
    factors, dense = FactorAnchor(policy, base), LoraAnchor(policy, base)
    assert {layer.weight.data_ptr() for _, layer in quantised_layers(factors.model)} == packed
    assert not list(quantised_layers(dense.model))
    prompts, rows = [[5, 6, 7]] * 2, [[9, 10, 11, 12], [13, 14]]
    expected = torch.cat(token_logps(policy, prompts, rows))
    for anchor in (factors, dense):
        assert (torch.cat(token_logps(anchor.model, prompts, rows)) - expected).abs().max() < 1e-4


def test_a_dense_anchor_shares_the_layers_that_have_no_adapter(loaded):
    model, *_ = loaded
    base = sharing_copy(model).requires_grad_(False)
    policy = adapted(model, targets=["q_proj"]).get_base_model()
    anchor = LoraAnchor(policy, base, "cpu")  # a bf16 copy scores; quantised weights are the same
    kept = dict(quantised_layers(anchor.model))
    assert len(kept) == 6 * model.config.num_hidden_layers
    for name, layer in kept.items():
        assert torch.equal(dequantised(layer), dequantised(base.get_submodule(name)))


def test_the_written_model_is_the_directory_plus_the_product(loaded, directory, tmp_path):
    model, tokenizer, *_ = loaded
    policy = adapted(model)
    assert is_rounded(policy)
    tmp_path.joinpath("out").mkdir()
    write_merged(policy, products_of(policy), directory, tokenizer, tmp_path / "out")
    found, base = load_file(tmp_path / "out/model.safetensors"), load_file(directory / "model.safetensors")
    assert found.keys() == base.keys()
    for name, weight in base.items():
        expected = weight.float()
        layer = name.removesuffix(".weight")
        if "_proj" in layer:
            module = policy.get_base_model().get_submodule(layer)
            expected = expected + 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert (found[name] - expected).abs().max() < 1e-7, name
    config = json.loads((tmp_path / "out/config.json").read_text())
    written = json.loads((directory / "config.json").read_text())
    assert config == written
    again, _ = load_policy(tmp_path / "out")
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_the_anchors_products_are_averages_less_the_quantised_base(loaded, directory, tmp_path):
    """ema/ is the directory's base plus what the average adds, for both kinds of anchor."""
    model, *_ = loaded
    base = sharing_copy(model).requires_grad_(False)
    policy = adapted(model)
    plain = policy.get_base_model()
    anchors = FactorAnchor(plain, base), LoraAnchor(plain, base)
    start = {name: product() for name, product in products_of(policy).items()}
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            parameter.data *= 3
    end = {name: product() for name, product in products_of(policy).items()}
    for anchor in anchors:
        anchor.update(plain, 0.25)
        found = anchor.products()
        assert found.keys() == start.keys()
        for name in found:  # A is the same on both sides, so the average of the factors is that of the products
            assert (found[name]() - (0.75 * start[name] + 0.25 * end[name])).abs().max() < 1e-6


def test_quantised_weights_are_never_cast(loaded):
    """The policy is measured as it is trained; a copy in another precision has the same quantised matrices."""
    model, *_ = loaded
    base = sharing_copy(model).requires_grad_(False)
    copied = rounded_copy(base, torch.bfloat16, CPU)
    assert copied.dtype == torch.bfloat16
    for name, layer in quantised_layers(base):
        assert torch.equal(dequantised(copied.get_submodule(name)), dequantised(layer))
    with as_loaded(base, torch.float32) as measured:
        assert measured is base
    policy = adapted(model).get_base_model()
    with trained_weights(policy, base, torch.bfloat16) as measured:
        assert measured is policy


def test_vllm_is_given_plain_weights_of_quantised_layers(loaded):
    """Those with an adapter and those without, under the names of the plain model."""
    model, *_ = loaded
    policy = adapted(model, targets=["q_proj"]).get_base_model()
    sender = PlainWeights.__new__(PlainWeights)
    sender.model = policy
    sent = dict(sender._iter_named_params())
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        layer = policy.get_submodule(name.removesuffix(".weight"))
        expected = dequantised(layer.get_base_layer() if "q_proj" in name else layer)
        if "q_proj" in name:
            expected = expected + layer.get_delta_weight("default")
        assert (sent[name] - expected).abs().max() < 1e-7
    assert all(value.is_floating_point() and "lora" not in name for name, value in sent.items())


def test_shards_hold_every_tensor_once(loaded, directory, tmp_path, monkeypatch):
    model, tokenizer, _, _ = loaded
    policy = adapted(model)
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    write_merged(policy, products_of(policy), directory, tokenizer, tmp_path / "one")
    monkeypatch.setattr(merged_output, "SHARD", 4000)
    write_merged(policy, products_of(policy), directory, tokenizer, tmp_path / "many")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole, files = load_file(tmp_path / "one/model.safetensors"), set(index["weight_map"].values())
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in whole.values())
    parts = [load_file(tmp_path / "many" / file) for file in sorted(files)]
    assert sum(map(len, parts)) == len(whole)
    assert all(torch.equal(value, whole[name]) for part in parts for name, value in part.items())
    assert {name: file for file in files for name in load_file(tmp_path / "many" / file)} == index["weight_map"]
    load_policy(tmp_path / "many")


def test_a_base_that_changed_since_it_was_loaded_is_refused(loaded, directory, tmp_path):
    model, tokenizer, _, _ = loaded
    policy = adapted(model)
    base = load_file(directory / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in base.items() if key != name}, other / "model.safetensors")
    with pytest.raises(InputError, match=f"has no {name} any longer"):
        write_merged(policy, products_of(policy), other, tokenizer, tmp_path)
    save_file(base | {name: base[name][:4].clone()}, other / "model.safetensors")
    with pytest.raises(InputError, match="has the shape"):
        write_merged(policy, products_of(policy), other, tokenizer, tmp_path)


def test_the_difference_is_that_of_the_two_models(loaded, directory, tmp_path):
    model, tokenizer, notes, _ = loaded
    policy = adapted(model)
    (tmp_path / "out").mkdir()
    write_merged(policy, products_of(policy), directory, tokenizer, tmp_path / "out")
    rows = [[2, 9, 30, 77, 5], [2, 8, 8]]
    found = policy_difference(policy, tmp_path / "out", rows, notes, half=False)
    written, _ = load_policy(tmp_path / "out")
    divergence, largest = [], 0.0
    with torch.no_grad():
        for row in rows:
            ours, theirs = (net(torch.tensor([row])).logits[0].double() for net in (policy, written))
            largest = max(largest, float((ours - theirs).abs().max()))
            p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
            divergence += (p.exp() * (p - q)).sum(-1).tolist()
    assert found["merged_kl"] == pytest.approx(sum(divergence) / len(divergence), rel=0.02, abs=1e-7)
    assert found["merged_logit_difference"] == pytest.approx(largest, rel=1e-3)
    assert f"logits differ by at most {largest:.2g}" in notes.notes[-1]
    with torch.no_grad():  # a base that is somewhere else: the reader is warned
        for _, layer in quantised_layers(policy):
            layer.weight.zero_()
        policy.get_base_model().model.embed_tokens.weight.mul_(30)
    assert policy_difference(policy, tmp_path / "out", rows, notes, half=False)["merged_kl"] > 0.05
    assert "measure the output with gemma2 eval" in notes.warnings[-1]


def test_a_base_in_fp32_is_not_read_again(directory):
    model, _ = load_trained(directory, LoraFields(lora_rank=3), Notes())
    assert not is_rounded(model)
    assert not is_rounded(adapted(model))
