"""The sound models of these tests."""

import json

import pytest
from broken_models import write_adapter

from gemma2.posttrain.tiny.networks import save_random


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A policy, a reward model, and an adapter of the policy, all as they should be."""
    root = tmp_path_factory.mktemp("sound")
    save_random(root / "policy", 0)
    save_random(root / "reward", 1, "reward")
    config = json.loads((root / "reward" / "config.json").read_text())
    (root / "reward" / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    write_adapter(root / "adapter", root / "policy")
    return root
