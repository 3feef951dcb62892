"""What a command writes, by part: sums by hand; and hours from a rate."""

import pytest

from gemma2.posttrain.planning.disk import disk_of
from gemma2.posttrain.planning.durations import UNKNOWN, Trial, duration
from gemma2.posttrain.planning.shapes import SIZES, shape_of
from gemma2.posttrain.schemas import GenerateConfig, RlhfConfig, SftConfig, WarpConfig

N = SIZES["2b"].parameters
ADAPTER = SIZES["2b"].adapter_parameters(8)
ADAPTED = SIZES["2b"].adapted_weights()
RL = {"policy": "2b", "reward": "2b", "prompts": "p"}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (SftConfig(model="2b", data="d"), {"output": 4 * N, "3 checkpoints": 3 * 12 * N}),
        (
            SftConfig(model="2b", data="d", keep="best", eval_every=9),
            {"output": 4 * N, "3 checkpoints": 36 * N, "best weights": 4 * N},
        ),
        (SftConfig(model="2b", data="d", lora_rank=8), {"output": 4 * N, "3 checkpoints": 36 * ADAPTER}),
        (
            SftConfig(model="2b", data="d", lora_rank=8, lora_output="adapter"),
            {"output": 4 * ADAPTER, "3 checkpoints": 36 * ADAPTER},
        ),
        (RlhfConfig(**RL, anchor="sft"), {"output": 4 * N, "3 checkpoints": 36 * N}),
        (RlhfConfig(**RL), {"output": 4 * N, "anchor, next to the output": 4 * N, "3 checkpoints": 3 * 16 * N}),
        (
            RlhfConfig(**RL, lora_rank=8),  # the average of what the adapter is added to
            {
                "output": 4 * N,
                "anchor, next to the output": 4 * N,
                "3 checkpoints": 3 * (12 * ADAPTER + 4 * ADAPTED),
            },
        ),
        (GenerateConfig(teacher="2b", prompts="p"), {}),
    ],
)
def test_the_parts_are_those_that_a_run_writes(config, parts):
    assert {part.name: part.bytes for part in disk_of(config, shape_of)} == pytest.approx(parts)


def test_one_policy_makes_no_merge_and_jobs_write_checkpoints_at_once():
    common = {"sft": "2b", "reward": "2b", "prompts": "p", "heldout": "h", "iterations": 3}
    one = {part.name: part.bytes for part in disk_of(WarpConfig(**common, policies=1), shape_of)}
    assert "3 merges" not in one and one["3 inits"] == pytest.approx(12 * N)
    several = {part.name for part in disk_of(WarpConfig(**common, policies=4, jobs=2), shape_of)}
    assert {"12 policies", "3 merges", "checkpoints of 2 at a time"} <= several


def test_hours_follow_from_a_rate_or_a_trial_and_from_nothing_else():
    sft = SftConfig(model="2b", data="d")
    assert duration(sft, 7200.0, 10) == {"tokens_trained_about": 7200, "time": UNKNOWN}
    assert duration(sft, 7200.0, 10, throughput=2.0)["hours"] == 1.0
    tried = duration(sft, 7200.0, 1800, trial=Trial(3, 2.0, 2.0**30))
    assert (tried["hours"], tried["measured_peak_gib"]) == (1.0, 1.0)
    assert "hours" not in duration(sft, float("nan"), None, throughput=2.0)
