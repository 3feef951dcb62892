"""The GPUs of a WARP run: the fewest that an RL run fits, those that were asked for, next to each other."""

import math
from pathlib import Path

import pytest
from stages import compiled

from gemma2.core.errors import UsageError
from gemma2.posttrain.pipelines import warp
from gemma2.posttrain.pipelines.warp import run_warp, warp_pipeline, with_gpus
from gemma2.posttrain.planning.shapes import SIZES
from gemma2.posttrain.runs.machine import Gpu, Memory
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import Resources, WarpConfig


class Notes:
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


def config(size="2b", **more) -> WarpConfig:
    given = {"sft": size, "prompts": "p", "heldout": "h", "reward": [size], "prompts_per_step": 16, "n": 4}
    return WarpConfig(**given | {"micro_batch_size": 1, "max_new_tokens": 256} | more)


def cards(count: int, size: float = 80e9) -> tuple[Gpu, ...]:
    return tuple(Gpu(str(number), Memory(size, "NVIDIA")) for number in range(count))


@pytest.fixture(autouse=True)
def _sizes(monkeypatch):
    """Gemma 2 by the size in a path, in place of directories."""
    monkeypatch.setattr(warp, "sizes_of", lambda *_: lambda path: SIZES[Path(path).name])


@pytest.mark.parametrize(
    ("size", "more", "expected"),
    [
        # "fewest GPUs of 80 GB" of the design's table for RLHF
        ("2b", {}, 2),
        ("2b", {"lora_rank": 16}, 1),
        ("9b", {}, 8),
        ("9b", {"lora_rank": 16}, 2),
        ("9b", {"lora_rank": 16, "strategy": "ddp"}, None),  # a whole model on each fits no card
        ("27b", {}, None),
    ],
)
def test_an_rl_run_gets_the_fewest_gpus_that_it_fits(size, more, expected):
    notes = Notes()
    found = with_gpus(config(size, **more), cards(8), notes)
    assert found.gpus_per_policy == expected
    assert notes.said == (
        [f"each RL run gets {expected} of 8 GPUs: the fewest that it fits by the plan"] if (expected or 1) > 1 else []
    )


def test_what_was_asked_for_stays_and_one_gpu_or_an_unknown_one_decides_nothing():
    assert with_gpus(config(gpus_per_policy=5), cards(8)).gpus_per_policy == 5
    assert with_gpus(config(), cards(1)).gpus_per_policy is None
    assert with_gpus(config(), cards(8, math.nan)).gpus_per_policy is None
    assert with_gpus(config(prompts_per_step=15), cards(8)).gpus_per_policy == 3  # 2 do not divide the prompts


def test_the_gpus_are_those_of_the_rl_runs_and_the_rest_has_its_own_default(tmp_path):
    made = warp_pipeline(config(gpus_per_policy=2, nodes=2, cpus=4, strategy="fsdp"), tmp_path).stages
    for stage in made.values():
        gang = {"gpus": 2, "nodes": 2} if stage.command == "rlhf" else {}
        assert stage.resources == Resources(cpus=4, **gang)
        assert ("strategy" in stage.options) == (stage.command == "rlhf")
    assert made["iteration-1/policy-1"].options["strategy"] == "fsdp"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus": 5}, r"--gpus 5: the stages of this run have 4 GPUs; give --gpus 4, or drop it"),
        ({"gpus_per_policy": 8}, r"--gpus-per-policy 8: the stages of this run have 4 GPUs; give --gpus-per-policy 4"),
        ({"gpus": 2, "gpus_per_policy": 3}, r"--gpus-per-policy 3: the stages of this run have 2 GPUs"),
    ],
)
def test_more_gpus_than_there_are_is_one_line(tmp_path, monkeypatch, asked, said):
    monkeypatch.setattr(warp, "visible_devices", lambda: cards(4))
    with pytest.raises(UsageError, match=said):
        run_warp(config(**asked), RunOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"slurm": ["partition=gpu"]}, "--slurm is for --executor slurm; give that too, or drop it"),
        ({"gpus": 4, "executor": "ray"}, "--gpus is for --executor local; drop it, --executor ray knows its cluster"),
    ],
)
def test_settings_of_another_executor_are_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        config(**asked)


@pytest.mark.parametrize(("jobs", "said"), [(1, ["8 GPUs hold 4 RL runs of 2 at once; --jobs 1 runs fewer"]), (4, [])])
def test_gpus_that_stay_idle_are_named(tmp_path, jobs, said):
    notes = Notes()
    settings = config(policies=4, jobs=jobs, gpus_per_policy=2)
    warp._say_how_many_at_once(settings, warp_pipeline(settings, tmp_path), 8, notes)
    assert notes.said == said


def test_a_warp_stage_of_a_pipeline_has_no_settings_of_a_run(tmp_path):
    options = {"sft": "m", "prompts": "p", "heldout": "h", "reward_fn": ["r:f"], "slurm": ["partition=gpu"]}
    with pytest.raises(UsageError, match=r"stages\.w\.options\.slurm is for a whole pipeline; drop it; give --slurm"):
        compiled({"w": {"command": "warp", "options": options}}, tmp_path)
