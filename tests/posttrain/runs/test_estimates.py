"""What --dry-run says: parameters from headers, memory, disk and time by hand, and the refusals of the real run."""

import json
import math
import struct
from pathlib import Path

import pytest

from gemma2.core.errors import InputError, OutputError
from gemma2.core.outputs.safetensors_header import parameter_count
from gemma2.posttrain.runs import estimates
from gemma2.posttrain.runs.estimates import GIB, count_rows, plan
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import (
    GenerateConfig,
    PairsConfig,
    ParetoConfig,
    RewardConfig,
    RlhfConfig,
    SftConfig,
    TinyConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config

N = 3 * 5 + 7  # parameters of the model below
RATE = 1e9  # floating-point operations per second


def safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(position))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "matmul_rate", lambda: RATE)
    for name in ("model", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    safetensors(tmp_path / "model" / "model-1.safetensors", {"a": [3, 5]})
    safetensors(tmp_path / "model" / "model-2.safetensors", {"b": [7]})
    safetensors(tmp_path / "reward" / "model.safetensors", {"a": [2]})
    (tmp_path / "rows.jsonl").write_text(('{"prompt": "' + "x" * 65 + '"}\n') * 20)  # 80 bytes: 20 tokens a row
    return tmp_path


def planned(place, config: Config, **options):
    return plan(config, RunOptions(place / "out", **options))


def needs(document):
    return document["memory_gib"], document["disk_gib"], document["cpu_hours_at_least"]


def shown(memory: float, disk: float, operations: float):
    """Bytes and floating-point operations as the plan prints them."""
    return round(memory / GIB, 3), round(disk / GIB, 3), float(f"{operations / RATE / 3600:.2g}")


# --- counting ---------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_over_all_shards_from_the_headers(place):
    assert parameter_count(place / "model") == N


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 8, struct.pack("<Q", 2) + b"[]"])
def test_a_shard_that_is_none_is_named(place, content):
    (place / "model" / "model-2.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model-2\.safetensors"):
        parameter_count(place / "model")


def test_rows_are_counted_without_blank_lines_also_inside_an_output(place):
    (place / "data").mkdir()
    (place / "data" / "data.jsonl").write_text("{}\n\n{}\n{}")
    assert count_rows(place / "data" / "data.jsonl") == count_rows(place / "data") == 3


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_missing_or_empty_data_is_refused_by_name(place, content):
    if content is not None:
        (place / "none.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"none\.jsonl (has no rows|does not exist)"):
        count_rows(place / "none.jsonl")


# --- needs, by hand ---------------------------------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch):
    """A billion parameters per model, so that the figures are not rounded away; any disk is large enough."""
    monkeypatch.setattr(estimates, "parameter_count", lambda path: 10**8 if path.name == "reward" else 10**9)
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**15}))


def test_a_full_fine_tune_needs_sixteen_bytes_and_six_operations_per_parameter_and_token(place, large):
    config = SftConfig(model=place / "model", data=place / "rows.jsonl", epochs=2, batch_size=4)
    tokens = 20 * 2 * 20  # rows, epochs, tokens per row
    # Disk: the output (4) and three checkpoints with weights (4) and Adam's moments (8).
    assert needs(planned(place, config)) == shown(16e9, (4 + 3 * 12) * 1e9, 6e9 * tokens)


def test_a_step_limit_and_a_length_limit_bound_the_work(place, large):
    config = SftConfig(model=place / "model", data=place / "rows.jsonl", max_steps=3, batch_size=4, max_length=8)
    assert needs(planned(place, config))[2] == shown(0, 0, 6e9 * 3 * 4 * 8)[2]


def test_an_adapter_needs_hardly_more_than_the_weights(place, large):
    full = planned(place, SftConfig(model=place / "model", data=place / "rows.jsonl"))
    lora = planned(place, SftConfig(model=place / "model", data=place / "rows.jsonl", lora_rank=8))
    assert 4e9 / GIB < lora["memory_gib"] < full["memory_gib"] / 3
    assert lora["disk_gib"] < full["disk_gib"]


def test_generation_costs_two_operations_per_parameter_and_token(place, large):
    config = GenerateConfig(teacher=place / "model", prompts=place / "rows.jsonl", n=3, max_new_tokens=10, limit=5)
    assert needs(planned(place, config)) == shown(4e9, 6 * 5 * 3 * 10, 2e9 * 5 * 3 * 10)
    pairs = PairsConfig(model=place / "model", prompts=place / "rows.jsonl", judge="m:f", n=3, max_new_tokens=10)
    assert needs(planned(place, pairs)) == shown(4e9, 6 * 20 * 3 * 10, 2e9 * 20 * 3 * 10)


def test_rl_holds_policy_gradients_moments_anchor_reference_and_reward_model(place, large):
    common = {"prompts": place / "rows.jsonl", "reward": place / "reward", "steps": 7}
    settings = {"prompts_per_step": 2, "n": 3, "max_new_tokens": 10}
    tokens = 7 * 2 * 3 * 10
    one = shown(24e9 + 4e8, 8e9 + 3 * 16e9, tokens * (10e9 + 2e8))
    assert needs(planned(place, RlhfConfig(policy=place / "model", **common, **settings))) == one
    warp = WarpConfig(sft=place / "model", heldout=place / "rows.jsonl", policies=3, iterations=2, **common, **settings)
    two = common | {"reward": (place / "reward", place / "model")}
    pair = needs(planned(place, RlhfConfig(policy=place / "model", **two, **settings)))
    assert pair == shown(24e9 + 4e8 + 4e9, 8e9 + 3 * 16e9, tokens * (10e9 + 2e8 + 2e9))
    averaged = RlhfConfig(policy=place / "model", reward_ensemble="warm", **two, **settings)
    assert needs(planned(place, averaged)) == one, "one model at the cost of one"
    several = needs(planned(place, warp))
    assert several[0] == one[0], "one run after the other"
    assert several[2] == shown(0, 0, 6 * tokens * (10e9 + 2e8))[2]
    assert several[1] > 2 * (3 + 1) * 4e9 / GIB, "every policy and slerp stays"


@pytest.mark.parametrize(
    ("settings", "memory", "disk"),
    [
        # weights 4, gradients and moments 12, reference 4, anchor 4; disk: policy, anchor, three checkpoints of 12 + 4
        ({}, 24, 4 + 4 + 3 * 16),
        ({"anchor": "none"}, 20, 4 + 3 * 12),
        ({"anchor": "sft"}, 20, 4 + 3 * 12),
        ({"anchor_memory": "cpu"}, 26, 4 + 4 + 3 * 16),
        # an adapter is a twentieth of gradients and moments, and the reference is the frozen weights
        ({"lora_rank": 8}, 4 + 0.6 + 4, 4 + 4 + 3 * 4.6),
        ({"lora_rank": 8, "lora_anchor": "factors"}, 4 + 0.6 + 0.2, 4 + 0.2 + 3 * 0.8),
        ({"lora_rank": 8, "sft": "model"}, 4 + 0.6 + 4 + 4, 4 + 4 + 3 * 4.6),
    ],
)
def test_the_anchor_and_the_adapter_decide_what_rl_holds(place, large, settings, memory, disk):
    if "sft" in settings:
        settings = settings | {"sft": place / settings["sft"]}
    config = RlhfConfig(policy=place / "model", prompts=place / "rows.jsonl", reward_fn="m:f", **settings)
    assert needs(planned(place, config))[:2] == shown(memory * 1e9, disk * 1e9, 0)[:2]


def test_every_command_with_an_estimate_gives_one(place):
    model, rows = place / "model", place / "rows.jsonl"
    configs = [
        RewardConfig(model=model, data=rows),
        ParetoConfig(sft=model, prompts=rows, policies=(model,), reward=place / "reward"),
    ]
    for config in configs:
        assert planned(place, config)["cpu_hours_at_least"] >= 0
    assert "memory_gib" not in planned(place, TinyConfig())


# --- what it refuses, and that it writes nothing ----------------------------------------------------------------------


def test_a_plan_writes_nothing_and_shows_models_and_the_configuration(place):
    before = sorted(place.rglob("*"))
    config = SftConfig(model=place / "model", data=place / "rows.jsonl", learning_rate=1e-6)
    document = planned(place, config)
    assert sorted(place.rglob("*")) == before
    assert document["plan"] == f"sft -> {place / 'out'}, nothing was written"
    assert document["model"] == f"{place / 'model'} (22 parameters)"
    assert document["config"] == config.model_dump(mode="json")


def test_a_plan_refuses_what_the_run_would_refuse(place):
    sft = SftConfig(model=place / "model", data=place / "rows.jsonl")
    (place / "out").mkdir()
    (place / "out" / "file").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        planned(place, sft)
    planned(place, sft, force=True)
    (place / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        planned(place, sft, force=True)
    with pytest.raises(InputError, match=r"--policy .* is not a directory"):
        planned(place, RlhfConfig(policy=place / "gone", prompts=place / "rows.jsonl"))
    with pytest.raises(OutputError, match="overlap"):
        plan(sft, RunOptions(place / "model" / "out"))


def test_a_disk_that_is_too_small_is_refused_with_both_figures(place, large, monkeypatch):
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda path: type("Usage", (), {"free": GIB}))
    config = SftConfig(model=place / "model", data=place / "rows.jsonl")
    with pytest.raises(InputError, match=r"needs about 37\.3 GiB and 1\.0 GiB are free"):
        planned(place, config)


def test_the_measured_rate_is_that_of_a_computer():
    assert 1e8 < estimates.matmul_rate(128) < 1e15
