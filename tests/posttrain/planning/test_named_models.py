"""Models that are not on this disk: sizes, and hub ids of which only the headers are read."""

import json
from pathlib import Path

import pytest
from fake_hub import FakeHub
from light_model import light_model

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.merging.remote import hub_requests
from gemma2.posttrain.checks.kinds import wanted_kind
from gemma2.posttrain.planning.estimates import Sources
from gemma2.posttrain.planning.named_models import name_models, sizes_of
from gemma2.posttrain.planning.shapes import SIZES
from gemma2.posttrain.schemas import RlhfConfig, SftConfig


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model on a hub of this machine, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = light_model(tmp_path / "served" / "a", num_attention_heads=2, intermediate_size=16)
    with FakeHub({"org/a": model}).serving() as served:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{constants}.ENDPOINT", served.url)
        address = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url, raising=False)
        yield served


def test_a_size_is_a_policy_or_a_reward_model_where_one_is_wanted():
    config = RlhfConfig(policy="2B", reward=("2b", "9b"), sft="2b", prompts="p")
    found, named = name_models(config, wanted_kind(config), sizes=True)
    sizes = sizes_of(named, Sources(named.promised))
    assert sizes(found.policy) == sizes(found.sft) == SIZES["2b"]
    assert [sizes(path) for path in found.reward] == [SIZES["2b"], SIZES["9b"]]
    kinds = [named.promised[path].kind for path in (found.policy, *found.reward)]
    assert kinds == ["policy", "reward model", "reward model"]


def test_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    light_model(Path("9b"))
    config = SftConfig(model="9b", data="rows")
    found, named = name_models(config, wanted_kind(config), sizes=True)
    assert found.model == Path("9b")
    assert sizes_of(named, Sources(named.promised))(found.model).parameters == 300 * 8 + 8


def test_a_size_is_for_plan_alone_as_a_run_needs_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 4)
    (tmp_path / "p.yaml").write_text("stages: {one: {command: sft, options: {model: 9b, data: [rows.jsonl]}}}\n")
    for line in ("sft --model 9b --data rows.jsonl --out out", "chat 9b", "pipeline run p.yaml --out runs"):
        with pytest.raises(InputError, match="9b"):
            invoke([*line.split(), "--dry-run"])
    assert invoke(["plan", "sft", "--model", "9b", "--data", "rows.jsonl"]) == 0
    assert invoke(["plan", "chat", "9b"]) == 0


def test_of_a_hub_id_the_headers_are_read_and_no_weights(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub_requests, "HEAD", 64)  # shorter than the header of this model
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 4)
    for words in (["sft", "--out", "out", "--dry-run"], ["plan", "sft"]):
        command = [*words[:2], *words[2:], "--model", "org/a", "--data", "rows.jsonl", "--json"]
        assert invoke(command) == 0
        document = json.loads(capsys.readouterr().out)
        assert "2,408 parameters: org/a: headers of the hub" in document["model"]
        assert document["data"][0]["tokens_max"] > 0  # its tokenizer was read
    assert hub.ranges and all(end <= 1000 < 300 * 8 * 4 for _, _, end in hub.ranges)
    assert list((tmp_path / "hub").rglob("*.safetensors")) == []


def test_dry_runs_of_what_reads_whole_models_fetch_no_weights(hub, tmp_path, capsys):
    for line in ("doctor org/a", "inspect org/a", "chat org/a -p hello"):
        assert invoke([*line.split(), "--dry-run"]) == 0
    assert "attention" in capsys.readouterr().out
    assert list((tmp_path / "hub").rglob("*.safetensors")) == []


def test_the_plan_of_a_pipeline_fetches_no_weights_either(hub, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 4)
    (tmp_path / "p.yaml").write_text("""
stages:
  sft: {command: sft, options: {model: org/a, data: [rows.jsonl]}}
  two: {command: sft, options: {model: "${sft.out}", data: [rows.jsonl]}}
""")
    invoke(["pipeline", "run", "p.yaml", "--out", "out/runs", "--dry-run", "--json"])
    first, second = json.loads(capsys.readouterr().out)["plan"]
    assert first["memory_gib"] == second["memory_gib"]
    assert list((tmp_path / "hub").rglob("*.safetensors")) == []


def test_without_headers_the_configuration_counts_and_it_says_so(hub, tmp_path, capsys):
    hub.fault = lambda name, first, end: 500
    assert invoke(["plan", "sft", "--model", "org/a", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert "config.json alone, the headers could not be read" in model


def test_offline_an_id_that_is_not_in_the_cache_is_one_line_that_names_the_sizes(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE forbids.* or plan with a size: --model 2b, 9b, 27b"):
        invoke(["plan", "sft", "--model", "org/a"])
