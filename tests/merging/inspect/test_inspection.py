"""`inspect` of an adapter and of a model in the hub's cache; for models on disk see test_merge_plan."""

import json

import numpy as np
import pytest
from model_files import entries, random_arrays, safetensors_bytes, write_model

from gemma2.cli.main import run
from gemma2.core.errors import InputError
from gemma2.merging import inspect_model

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture
def adapter(tmp_path):
    """Rank 2 on q_proj, rank 4 on up_proj, a norm in full."""
    path = tmp_path / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "rank_pattern": {"up_proj": 4}}
    config |= {"base_model_name_or_path": "runs/sft", "modules_to_save": ["norm"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    shapes = {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (8, 2)}
    shapes |= {f"{UP}.lora_A.weight": (4, 8), f"{UP}.lora_B.weight": (12, 4), "model.norm.weight": (8,)}
    arrays = {f"base_model.model.{name}": np.ones(shape) for name, shape in shapes.items()}
    (path / "adapter_model.safetensors").write_bytes(safetensors_bytes(entries(arrays, "BF16")))
    return path


def test_an_adapter_is_described_by_rank_scale_targets_and_model(adapter):
    found = inspect_model(adapter)
    assert (found["kind"], found["base_model"], found["lineage"]) == ("adapter", "runs/sft", None)
    assert (found["rank"], found["scale"]) == ([2, 4], [2.0, 4.0])
    assert (found["targets"], found["replaced"]) == ({"q_proj": 1, "up_proj": 1}, ["model.norm.weight"])
    assert found["parameters"] == 2 * 16 + 4 * 8 + 12 * 4 + 8
    assert found["bytes"] == 2 * found["parameters"]
    assert found["dtypes"] == {"BF16": found["parameters"]}
    assert {"tensor": f"{UP}.weight", "shape": [12, 8], "rank": 4, "scale": 2.0} in found["updates"]


def test_the_lineage_of_an_adapter_is_that_of_its_manifest(adapter):
    manifest = {"command": "sft", "status": "complete", "parents": [{"role": "policy", "path": "../sft"}], "files": {}}
    (adapter / "gemma2.json").write_text(json.dumps(manifest))
    assert inspect_model(adapter)["lineage"]["command"] == "sft"
    (adapter / "gemma2.json").write_text(json.dumps(manifest | {"status": "running"}))
    with pytest.raises(InputError, match="unfinished output"):
        inspect_model(adapter)


def test_the_screen_shows_an_adapter_and_its_updates_or_tensors(adapter, capsys):
    assert run(["inspect", str(adapter)]) == 0
    shown = capsys.readouterr().out
    for line in ("of model", "runs/sft", "rank", "2 4", "targets", "q_proj 1  up_proj 1", "in full", "tensor"):
        assert line in shown
    assert f"{Q}.weight" in shown
    run(["inspect", str(adapter), "--tensors"])
    assert "lora_A.weight" in capsys.readouterr().out
    run(["inspect", str(adapter), "--json"])
    assert json.loads(capsys.readouterr().out)["scale"] == [2.0, 4.0]


def test_a_hub_id_is_inspected_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--owner--tiny"
    write_model(repo / "snapshots" / ("0" * 40), random_arrays(0))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert inspect_model("owner/tiny")["parameters"] == 456
    with pytest.raises(InputError, match="owner/tinny is not a directory here"):
        inspect_model("owner/tinny")
