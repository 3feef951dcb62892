"""Models to export, and a hub that takes them."""

import json

import numpy as np
import pytest
from broken_models import write_adapter
from safetensors.numpy import load_file, save_file
from upload_hub import TOKEN, UploadHub

from gemma2.posttrain.tiny.networks import save_random


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A policy, a reward model, and an adapter of the policy."""
    root = tmp_path_factory.mktemp("models")
    save_random(root / "policy", 0)
    save_random(root / "reward", 1, "reward")
    config = json.loads((root / "reward" / "config.json").read_text())
    (root / "reward" / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    write_adapter(root / "adapter", root / "policy")
    factors = root / "adapter" / "adapter_model.safetensors"
    save_file({name: value.astype(np.float32) for name, value in load_file(factors).items()}, factors)
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this machine that knows one token, which is in the environment."""
    constants = "huggingface_hub.constants"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    with UploadHub(TOKEN).serving() as served:
        monkeypatch.setattr(f"{constants}.ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url, raising=False)
        yield served
