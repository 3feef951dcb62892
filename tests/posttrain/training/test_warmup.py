"""The warm-up: from the first step on, a share of the steps, never as long as the training."""

import math

import pytest
from lines import STEPS, Bars, fit, metrics_of, opened
from safetensors.torch import load_file
from torch import nn, optim
from transformers import get_scheduler

from gemma2.core.errors import UsageError
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig, TrainingFields, WarpConfig
from gemma2.posttrain.schemas.config import validated
from gemma2.posttrain.training.warmup import check_warmup, start_above_zero

PEAK = 0.1


def rates(tmp_path, name="out", steps=STEPS, progress=None, resume=False, **settings):
    """The learning rate of every step, and the weights."""
    schedule = settings.pop("schedule", "constant_with_warmup")
    with opened(tmp_path, name=name, resume=resume, **settings) as (config, run):
        weights = fit(config, run, progress or Bars(), max_steps=steps, lr_scheduler_type=schedule)
        lines = metrics_of(run)
    return [line["learning_rate"] for line in lines], weights


@pytest.mark.parametrize(("warmup", "steps"), [(1, 6), (3, 6), (5, 6), (2, 3)])
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_step_k_of_the_warmup_has_k_shares_of_the_rate_and_the_last_the_whole(tmp_path, warmup, steps, schedule):
    found, _ = rates(tmp_path, steps=steps, warmup_steps=warmup, schedule=schedule)
    assert found[:warmup] == pytest.approx([PEAK * k / warmup for k in range(1, warmup + 1)])


@pytest.mark.parametrize("settings", [{}, {"warmup_steps": 5}, {"warmup_ratio": 0.9}, {"warmup_ratio": 0.0}])
def test_the_first_step_moves_the_weights(tmp_path, settings):
    bars = Bars(2)  # the second step is interrupted, so that the checkpoint holds the first one
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, save_every=1, **settings) as (config, run):
        fit(config, run, bars)
    weights = load_file(run.checkpoints / "checkpoint-1" / "model.safetensors")
    assert weights["w"].norm() > 0


def schedule(name, warmup, steps):
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=PEAK)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    start_above_zero(scheduler, warmup)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (1, 2), (4, 9), (8, 9)])
def test_no_step_has_a_rate_of_0_and_one_has_the_whole_rate(name, warmup, steps):
    found = schedule(name, warmup, steps)
    assert min(found) > 0
    assert max(found) == pytest.approx(PEAK)
    assert found[:warmup] == pytest.approx([PEAK * k / warmup for k in range(1, warmup + 1)])


def test_transformers_itself_starts_at_0_and_would_do_so_again():
    """If this fails, transformers has changed its schedules and warmup.py may go."""
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=PEAK)
    get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=9)
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.9])
def test_the_ratio_is_a_share_of_the_steps_rounded_up(tmp_path, ratio):
    whole, _ = rates(tmp_path, steps=10, warmup_ratio=ratio)
    explicit, _ = rates(tmp_path, "explicit", steps=10, warmup_steps=math.ceil(10 * ratio))
    assert whole == explicit


def test_the_steps_win_over_the_ratio(tmp_path):
    both, _ = rates(tmp_path, warmup_ratio=0.9, warmup_steps=2)
    alone, _ = rates(tmp_path, "alone", warmup_steps=2)
    assert both == alone


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_that_is_interrupted_in_its_warmup_resumes_to_the_same_rates(tmp_path, stop):
    whole, weights = rates(tmp_path, "whole", warmup_steps=5)
    with pytest.raises(KeyboardInterrupt):
        rates(tmp_path, warmup_steps=5, progress=Bars(stop))
    again, resumed = rates(tmp_path, warmup_steps=5, resume=True)
    assert again == whole
    assert resumed.tolist() == weights.tolist()


COMMANDS = {
    RlhfConfig: {"policy": "p", "prompts": "p", "reward": "r", "steps": 5},
    WarpConfig: {"sft": "s", "prompts": "p", "heldout": "h", "reward": "r", "steps": [9, 5]},
    DistillConfig: {"model": "m", "teacher": "t", "prompts": "p", "steps": 5},
    SftConfig: {"model": "m", "data": "d", "max_steps": 5},
    RewardConfig: {"model": "m", "data": "d", "max_steps": 5},
}


@pytest.mark.parametrize(("kind", "values"), COMMANDS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_warmup_as_long_as_the_training_is_refused_and_the_fix_is_accepted(kind, values):
    for warmup in (5, 6, 100):
        with pytest.raises(UsageError) as caught:
            validated(kind, values | {"warmup_steps": warmup})
        assert f"warmup_steps {warmup} of 5 steps" in caught.value.what
        assert caught.value.hint.startswith("give --warmup-steps 4 or fewer")
    assert validated(kind, values | {"warmup_steps": 4}).warmup_steps == 4
    assert validated(kind, values).warmup_ratio == 0.05


def test_a_warmup_as_long_as_the_epochs_is_refused_when_the_steps_are_known():
    with pytest.raises(UsageError, match="warmup_steps 7 of 7 steps"):
        check_warmup(TrainingFields(warmup_steps=7), 7)
    check_warmup(TrainingFields(warmup_steps=6), 7)
