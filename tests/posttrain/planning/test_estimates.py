"""What a step needs: parameters from headers, disk and tokens by hand. Memory: test_memory.py."""

import struct

import pytest
from light_model import write_safetensors

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import parameter_count
from gemma2.posttrain.planning import estimates
from gemma2.posttrain.planning.estimates import GIB, Sources, count_rows, estimate
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


@pytest.fixture
def place(tmp_path):
    for name in ("model", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    write_safetensors(tmp_path / "model" / "model-1.safetensors", {"a": [3, 5]})
    write_safetensors(tmp_path / "model" / "model-2.safetensors", {"b": [7]})
    write_safetensors(tmp_path / "reward" / "model.safetensors", {"a": [2]})
    (tmp_path / "rows.jsonl").write_text(('{"prompt": "' + "x" * 65 + '"}\n') * 20)  # 80 bytes: 20 tokens a row
    return tmp_path


def planned(place, config: Config) -> dict:
    work = estimate(config, Sources())
    if work is None:
        return {}
    return {
        "disk_gib": round(work.disk / GIB, 3),
        "tokens": work.tokens,
    }


def needs(document):
    return document["disk_gib"], document["tokens"]


def shown(disk: float, tokens: float):
    """Bytes and tokens as the plan prints them."""
    return round(disk / GIB, 3), tokens


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
    """A billion parameters per model, so that the figures are not rounded away."""
    monkeypatch.setattr(estimates, "parameter_count", lambda path: 10**8 if path.name == "reward" else 10**9)


def test_a_full_fine_tune_writes_its_output_and_three_checkpoints(place, large):
    config = SftConfig(model=place / "model", data=place / "rows.jsonl", epochs=2, batch_size=4)
    tokens = 20 * 2 * 20  # rows, epochs, tokens per row
    # Disk: the output (4) and three checkpoints with weights (4) and Adam's moments (8).
    assert needs(planned(place, config)) == shown((4 + 3 * 12) * 1e9, tokens)


def test_a_step_limit_and_a_length_limit_bound_the_work(place, large):
    config = SftConfig(model=place / "model", data=place / "rows.jsonl", max_steps=3, batch_size=4, max_length=8)
    assert planned(place, config)["tokens"] == 3 * 4 * 8


def test_an_adapter_writes_less(place, large):
    full = planned(place, SftConfig(model=place / "model", data=place / "rows.jsonl"))
    lora = planned(place, SftConfig(model=place / "model", data=place / "rows.jsonl", lora_rank=8))
    assert lora["disk_gib"] < full["disk_gib"]


def test_generation_draws_up_to_the_limit(place, large):
    config = GenerateConfig(teacher=place / "model", prompts=place / "rows.jsonl", n=3, max_new_tokens=10, limit=5)
    assert needs(planned(place, config)) == shown(6 * 5 * 3 * 10, 5 * 3 * 10)
    pairs = PairsConfig(model=place / "model", prompts=place / "rows.jsonl", judge="m:f", n=3, max_new_tokens=10)
    assert needs(planned(place, pairs)) == shown(6 * 20 * 3 * 10, 20 * 3 * 10)


def test_rl_writes_policy_and_anchor_and_draws_every_token_once(place, large):
    common = {"prompts": place / "rows.jsonl", "reward": place / "reward", "steps": 7}
    settings = {"prompts_per_step": 2, "n": 3, "max_new_tokens": 10}
    tokens = 7 * 2 * 3 * 10
    one = shown(8e9 + 3 * 16e9, tokens)
    assert needs(planned(place, RlhfConfig(policy=place / "model", **common, **settings))) == one
    warp = WarpConfig(sft=place / "model", heldout=place / "rows.jsonl", policies=3, iterations=2, **common, **settings)
    several = needs(planned(place, warp))
    assert several[1] == 6 * tokens
    assert several[0] > 2 * (3 + 1) * 4e9 / GIB, "every policy and slerp stays"


@pytest.mark.parametrize(
    ("settings", "disk"),
    [
        # policy, anchor, three checkpoints of 12 + 4
        ({}, 4 + 4 + 3 * 16),
        ({"anchor": "none"}, 4 + 3 * 12),
        ({"anchor": "sft"}, 4 + 3 * 12),
        ({"lora_rank": 8}, 4 + 4 + 3 * 4.6),
        ({"lora_rank": 8, "lora_anchor": "factors"}, 4 + 0.2 + 3 * 0.8),
    ],
)
def test_the_anchor_and_the_adapter_decide_what_rl_writes(place, large, settings, disk):
    config = RlhfConfig(policy=place / "model", prompts=place / "rows.jsonl", reward_fn="m:f", **settings)
    assert needs(planned(place, config))[0] == shown(disk * 1e9, 0)[0]


def test_every_command_with_an_estimate_gives_one(place):
    model, rows = place / "model", place / "rows.jsonl"
    configs = [
        RewardConfig(model=model, data=rows),
        ParetoConfig(sft=model, prompts=rows, policies=(model,), reward=place / "reward"),
    ]
    for config in configs:
        assert planned(place, config)["tokens"] >= 0
    assert planned(place, TinyConfig()) == {}
