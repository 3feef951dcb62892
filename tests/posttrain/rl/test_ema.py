"""The anchor follows (1 - mu) ema + mu theta in fp32, whatever the policy's dtype, and survives a checkpoint."""

import pytest
import torch

from gemma2.core.errors import InputError
from gemma2.posttrain.rl.ema import EmaAnchor
from gemma2.posttrain.tiny.networks import random_model


def moved(policy, steps, scale, seed=0):
    """Random steps of the policy, in its own dtype; yields after each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        yield


def test_the_anchor_follows_the_float64_recursion():
    policy, mu = random_model(), 0.1
    anchor = EmaAnchor(policy)
    expected = {name: p.detach().double() for name, p in policy.named_parameters()}
    for _ in moved(policy, 50, 0.01):
        anchor.update(policy, mu)
        for name, parameter in policy.named_parameters():
            expected[name] = (1 - mu) * expected[name] + mu * parameter.detach().double()
    for name, tensor in anchor.shadow.items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6)


def test_mu_zero_is_a_fixed_anchor_and_mu_one_is_the_policy():
    policy = random_model()
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    still, mirror = EmaAnchor(policy), EmaAnchor(policy)
    for _ in moved(policy, 3, 0.1):
        still.update(policy, 0.0)
        mirror.update(policy, 1.0)
    for name, parameter in policy.named_parameters():
        assert torch.equal(still.shadow[name], start[name])
        assert torch.equal(mirror.shadow[name], parameter)
        assert not torch.equal(start[name], parameter)


def test_a_bf16_policy_moves_its_anchor_as_an_fp32_recursion_says():
    """1000 steps of 1e-6 at mu 0.01: an anchor kept in bf16 would stand still."""
    master, mu = random_model(), 0.01
    policy = random_model().bfloat16()
    anchor = EmaAnchor(policy)
    expected = {name: p.detach().double() for name, p in policy.named_parameters()}
    start = {name: tensor.clone() for name, tensor in anchor.shadow.items()}
    for _ in moved(master, 1000, 1e-6):
        with torch.no_grad():
            for low, high in zip(policy.parameters(), master.parameters(), strict=True):
                low.copy_(high)
        anchor.update(policy, mu)
        for name, parameter in policy.named_parameters():
            expected[name].lerp_(parameter.detach().double(), mu)
    # Over all weights together: most of one tensor may stand still in bf16.
    way = sum(((expected[name] - start[name].double()) ** 2).sum() for name in start) ** 0.5
    apart = sum(((tensor.double() - expected[name]) ** 2).sum() for name, tensor in anchor.shadow.items()) ** 0.5
    assert all(tensor.dtype == torch.float32 for tensor in anchor.shadow.values())
    assert way > 0
    assert apart < 1e-3 * way


def test_a_tied_embedding_moves_once():
    policy = random_model()
    anchor = EmaAnchor(policy)
    before = anchor.shadow["model.embed_tokens.weight"].clone()
    for _ in moved(policy, 1, 1.0):
        anchor.update(policy, 0.5)
    after = (before + policy.model.embed_tokens.weight.detach()) / 2
    assert torch.allclose(anchor.shadow["model.embed_tokens.weight"], after, atol=1e-6)
    assert "lm_head.weight" not in anchor.shadow
    assert anchor.model.lm_head.weight is anchor.model.model.embed_tokens.weight


def test_the_anchor_shares_no_memory_with_the_policy_and_takes_no_gradient():
    policy = random_model()
    anchor = EmaAnchor(policy)
    for mine, theirs in zip(anchor.model.parameters(), policy.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
        assert not mine.requires_grad
        assert theirs.requires_grad


def test_a_saved_anchor_is_restored_bit_for_bit(tmp_path):
    policy = random_model()
    anchor = EmaAnchor(policy)
    for _ in moved(policy, 2, 0.1):
        anchor.update(policy, 0.3)
    anchor.save(tmp_path / "anchor.safetensors")
    fresh = EmaAnchor(policy)
    fresh.load(tmp_path / "anchor.safetensors")
    assert all(torch.equal(tensor, anchor.shadow[name]) for name, tensor in fresh.shadow.items())


def test_a_checkpoint_without_an_anchor_or_with_another_is_refused(tmp_path):
    anchor = EmaAnchor(random_model())
    with pytest.raises(InputError, match="holds no anchor"):
        anchor.load(tmp_path / "anchor.safetensors")
    with pytest.raises(InputError, match="differ in"):
        anchor.load_state_dict({"other": torch.zeros(1)})
    with pytest.raises(InputError, match="of shape"):
        anchor.load_state_dict(EmaAnchor(random_model(hidden_size=32)).state_dict())
