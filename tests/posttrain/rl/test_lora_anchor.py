"""The anchor of a LoRA policy is the average of W + s B A; factor by factor it is something else, and says so."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gemma2.posttrain.models.lora import adapted_weights, merged_copy, sharing_copy
from gemma2.posttrain.rl.ema import EmaAnchor, FactorAnchor, LoraAnchor
from gemma2.posttrain.tiny.networks import random_model

RANK, ALPHA, MU = 4, 8.0, 0.1
IDS = torch.tensor([[1, 5, 9, 20, 7]])

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def adapted_policy():
    """(the plain causal LM with adapters in its layers, its weights from before, shared)."""
    policy = random_model()
    base = sharing_copy(policy).requires_grad_(False)
    get_peft_model(policy, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    return policy, base


def moved(policy, steps, scale=0.05):
    """Random steps of the factors; yields after each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter += scale * torch.randn(parameter.shape, generator=generator)
        yield


def effective(policy):
    """float64 W + (alpha / rank) B A by the name in the plain model, from the factors by hand."""
    parameters = dict(policy.named_parameters())
    found = {}
    for name, weight in parameters.items():
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            a, b = (parameters[f"{stem}.lora_{side}.default.weight"].detach().double() for side in "AB")
            found[f"{stem}.weight"] = weight.detach().double() + ALPHA / RANK * b @ a
    return found


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_the_dense_anchor_follows_the_float64_recursion_of_the_products():
    policy, base = adapted_policy()
    anchor = LoraAnchor(policy, base)
    expected = effective(policy)
    assert len(expected) == 2 * 7  # seven linear layers in each of two blocks
    for _ in moved(policy, 30):
        anchor.update(policy, MU)
        expected = {name: (1 - MU) * expected[name] + MU * now for name, now in effective(policy).items()}
    assert anchor.shadow.keys() == expected.keys()
    for name, tensor in anchor.shadow.items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6)
        assert torch.equal(anchor.model.get_parameter(name), tensor)


def test_the_average_of_the_factors_is_not_the_average_of_the_products():
    policy, base = adapted_policy()
    exact, approximate = LoraAnchor(policy, base), FactorAnchor(policy, base)
    expected = {name: p.detach().double() for name, p in policy.named_parameters() if "lora_" in name}
    for _ in moved(policy, 30):
        exact.update(policy, MU)
        approximate.update(policy, MU)
        for name, value in expected.items():
            value.lerp_(policy.get_parameter(name).detach().double(), MU)
    assert approximate.shadow.keys() == expected.keys()
    for name, tensor in approximate.shadow.items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6)
    # Both are near each other on the scale of the policy's own way, and not the same.
    start, products = dict(base.named_parameters()), dict(adapted_weights(approximate.model))
    way = sum((exact.shadow[name] - start[name]).norm() for name in products)
    apart = sum((exact.shadow[name] - product).norm() for name, product in products.items())
    assert 0.01 * way < apart < 2 * way


@pytest.mark.parametrize("kind", [LoraAnchor, FactorAnchor])
def test_an_anchor_starts_as_the_policy_and_is_not_moved_by_it(kind):
    policy, base = adapted_policy()
    list(moved(policy, 1))
    anchor = kind(policy, base)
    assert torch.allclose(logits(anchor.model), logits(policy), atol=1e-5)
    before = logits(anchor.model)
    list(moved(policy, 1))
    assert torch.equal(logits(anchor.model), before)
    assert not torch.allclose(logits(policy), before, atol=1e-3)


@pytest.mark.parametrize("kind", [LoraAnchor, FactorAnchor])
def test_what_is_not_adapted_is_shared_and_nothing_of_the_anchor_learns(kind):
    policy, base = adapted_policy()
    anchor = kind(policy, base)
    mine, theirs = anchor.model.get_input_embeddings().weight, policy.get_input_embeddings().weight
    assert mine.data_ptr() == theirs.data_ptr()
    assert not any(parameter.requires_grad for parameter in anchor.model.parameters())
    assert any(parameter.requires_grad for parameter in policy.parameters())
    own = {p.data_ptr() for name, p in anchor.model.named_parameters() if name in anchor.shadow}
    assert len(own) == len(anchor.shadow)
    assert not own & {p.data_ptr() for p in policy.parameters()}


def test_mu_one_makes_every_anchor_the_merged_policy():
    policy, base = adapted_policy()
    anchors = [LoraAnchor(policy, base), FactorAnchor(policy, base), LoraAnchor(policy, base, "cpu")]
    list(moved(policy, 2))
    merged = dict(merged_copy(base, policy).named_parameters())
    for anchor in anchors:
        anchor.update(policy, 1.0)
        plain = dict(anchor.plain().named_parameters())
        assert plain.keys() == merged.keys()
        assert all(torch.allclose(plain[name], merged[name], atol=1e-6) for name in merged)


def test_a_merged_copy_leaves_the_weights_it_came_from_alone():
    policy, base = adapted_policy()
    list(moved(policy, 1))
    before = {name: p.clone() for name, p in base.named_parameters()}
    copied = merged_copy(base, policy)
    assert torch.allclose(logits(copied), logits(policy), atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_anchor_on_the_host_averages_in_fp32_and_scores_in_bf16(kind):
    policy, base = (random_model(), None) if kind == "full" else adapted_policy()
    anchors = (
        [EmaAnchor(policy), EmaAnchor(policy, "cpu")]
        if base is None
        else [LoraAnchor(policy, base), LoraAnchor(policy, base, "cpu")]
    )
    for _ in moved(policy, 5, 1e-4):
        for anchor in anchors:
            anchor.update(policy, MU)
    near, far = anchors
    assert next(far.model.parameters()).dtype == torch.bfloat16
    for name, tensor in far.shadow.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, near.shadow[name])
        assert torch.equal(far.model.get_parameter(name), tensor.bfloat16())
    plain = dict(far.plain().named_parameters())
    assert all(torch.equal(plain[name], tensor) for name, tensor in near.shadow.items())


@pytest.mark.parametrize("kind", [LoraAnchor, FactorAnchor])
def test_a_saved_anchor_is_restored_bit_for_bit(kind, tmp_path):
    policy, base = adapted_policy()
    anchor = kind(policy, base)
    for _ in moved(policy, 2):
        anchor.update(policy, MU)
    anchor.save(tmp_path / "anchor.safetensors")
    fresh = kind(policy, base)
    fresh.load(tmp_path / "anchor.safetensors")
    assert all(torch.equal(tensor, anchor.shadow[name]) for name, tensor in fresh.shadow.items())
    assert torch.equal(logits(fresh.model), logits(anchor.model))
