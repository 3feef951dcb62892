"""How far training moved the weights, and how often it clipped: in the summary, with a warning about rounding."""

import pytest
import torch
from lines import STEPS, Bars, Line, metrics_of, opened, trained
from torch import nn

from gemma2.core.rounding import STILL
from gemma2.posttrain.training.movement import Movement


class Two(nn.Module):
    """Two tensors, of which one may be frozen."""

    def __init__(self, size=5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(size, size, generator=generator))
        self.b = nn.Parameter(torch.randn(size, generator=generator))


def moved(model, change):
    movement = Movement(model)
    with torch.no_grad():
        change(model)
    return movement.relative(model)


def test_the_relative_change_is_that_of_the_norms():
    model = Two()
    found = moved(model, lambda m: [p.mul_(1.25) for p in m.parameters()])
    assert found == pytest.approx(0.25)


def test_a_tensor_that_did_not_change_is_left_out():
    assert moved(Two(), lambda m: m.b.mul_(1.5)) == pytest.approx(0.5)


def test_an_unchanged_model_moved_by_0_and_a_frozen_one_cannot_be_compared():
    assert moved(Two(), lambda m: None) == 0.0
    frozen = Two()
    frozen.requires_grad_(False)
    assert moved(frozen, lambda m: m.a.mul_(2)) is None


def test_tensors_that_start_at_0_cannot_be_compared_alone():
    assert moved(Line(), lambda m: m.w.add_(1)) is None


def test_a_large_tensor_is_judged_by_a_sample():
    model = Two(700)
    assert model.a.numel() > 2**16
    change = 0.01 * torch.randn(700, 700, generator=torch.Generator().manual_seed(1))
    exact = float(change.norm() / model.a.detach().norm())
    assert moved(model, lambda m: m.a.add_(change)) == pytest.approx(exact, rel=0.02)


def test_an_adapter_counts_as_the_product_that_it_adds():
    from peft import LoraConfig, get_peft_model

    plain = nn.Sequential(nn.Linear(6, 4, bias=False))
    before = plain[0].weight.detach().clone()
    model = get_peft_model(plain, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    movement = Movement(model)
    assert movement.relative(model) == 0.0
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.fill_(0.1)
    after = 3 * model.base_model.model[0].lora_B["default"].weight @ model.base_model.model[0].lora_A["default"].weight
    assert movement.relative(model) == pytest.approx(float(after.detach().norm() / before.norm()), rel=1e-5)


def started():
    model = Line()
    with torch.no_grad():
        model.w.copy_(torch.tensor([1.5, 0.5, 2.0]))
    return model


@pytest.mark.parametrize("rate", [1e-12, 1e-9, 1e-6])
def test_a_run_that_moved_by_less_than_rounding_says_so_in_one_line(tmp_path, rate):
    bars = Bars()
    with opened(tmp_path, learning_rate=rate) as (config, run):
        _, summary = trained(config, run, bars, model=started())
    assert summary["weights_moved"] < STILL
    assert len(bars.warnings) == 1
    assert "does not differ from its start; raise --learning-rate" in bars.warnings[0]
    assert "\n" not in bars.warnings[0]


def test_a_run_that_learns_says_nothing_and_records_how_far_it_went(tmp_path):
    bars = Bars()
    model = started()
    before = model.w.detach().clone()
    with opened(tmp_path) as (config, run):
        after, summary = trained(config, run, bars, model=model)
    assert summary["weights_moved"] == pytest.approx(float((after - before).norm() / before.norm()))
    assert bars.warnings == []


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("limit", [0.0, 0.5, 5.0, 1e9])
def test_the_share_of_clipped_steps_is_that_of_the_norms(tmp_path, limit, log_every):
    with opened(tmp_path, name="all", max_grad_norm=limit) as (config, run):
        trained(config, run)
        norms = [line["gradient_norm"] for line in metrics_of(run)]
    share = sum(norm > limit for norm in norms) / STEPS if limit else 0.0
    with opened(tmp_path, max_grad_norm=limit, log_every=log_every) as (config, run):
        _, summary = trained(config, run)
        assert metrics_of(run)[-1]["clipped"] == pytest.approx(share)
    assert summary["clipped"] == pytest.approx(share)


def test_the_share_of_clipped_steps_counts_those_before_a_resume(tmp_path):
    with opened(tmp_path, name="whole", max_grad_norm=5.0) as (config, run):
        _, whole = trained(config, run)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, max_grad_norm=5.0) as (config, run):
        trained(config, run, Bars(5))
    with opened(tmp_path, max_grad_norm=5.0, resume=True) as (config, run):
        _, again = trained(config, run)
    assert again == whole
    assert 0 < whole["clipped"] < 1, "the limit must cut some steps for this test to say anything"
