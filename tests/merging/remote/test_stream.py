"""Merges of hub models that begin before the models are whole: same bytes, and nothing half-written counts as whole."""

from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub
from model_files import random_arrays, write_model

from gemma2.core.outputs.hub import locate_model
from gemma2.core.progress import _Silent
from gemma2.merging import MergeRequest, merge
from gemma2.merging.remote import hub_requests, hub_stream

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    **{f"model.layers.{layer}.mlp.up_proj.weight": (48, 32) for layer in range(3)},
    **{f"model.layers.{layer}.input_layernorm.weight": (32,) for layer in range(3)},
    "model.norm.weight": (32,),
}


class Notes(_Silent):
    """Keeps what the user is told, and calls `advanced` with each report of progress."""

    def __init__(self, advanced=lambda: None):
        self.lines = []
        self.advanced = advanced

    def note(self, text):
        self.lines.append(text)

    warn = note

    def advance(self, amount=1, **fields):
        self.advanced()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two models on a hub of this machine, an empty cache, and requests of a few bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    models = {f"org/{name}": write_model(tmp_path / "served" / name, random_arrays(seed, shapes=SHAPES), shards=shards)
              for seed, name, shards in ((1, "a", 1), (2, "b", 3), (3, "base", 2))}  # fmt: skip
    monkeypatch.setattr(hub_stream, "HEAD", 64)
    monkeypatch.setattr(hub_stream, "PART", 1 << 10)
    monkeypatch.setattr(hub_stream, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(hub_requests, "PIECE", 256)
    monkeypatch.setattr("gemma2.merging.plan.read_order.PIECE", 128)
    monkeypatch.setattr("gemma2.merging.plan.read_order.SMALL", 0)
    with FakeHub(models).serving() as served:
        point_at(served, tmp_path / "hub", monkeypatch)
        yield served


def point_at(served, cache, monkeypatch):
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.ENDPOINT", served.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url, raising=False)


def request(method="linear", names=("org/a", "org/b"), stream=True, **options):
    return MergeRequest(method=method, models=tuple(map(Path, names)), stream=stream, **options)


def weights_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def same_as_local(hub, tmp_path, method="linear", **options):
    """The merge of the folders that the hub serves."""
    local = {name: Path(folder) for name, folder in hub.models.items()}
    base = options.pop("base", None)
    options |= {"base": local[str(base)]} if base else {}
    merge(request(method, [local["org/a"], local["org/b"]], False, **options), out=tmp_path / f"local-{method}")
    return weights_of(tmp_path / f"local-{method}")


def test_the_bytes_are_those_of_a_merge_of_local_models_and_the_cache_is_whole(hub, tmp_path):
    merge(request(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path)
    snapshot = tmp_path / "hub" / "models--org--b" / "snapshots" / COMMIT
    assert weights_of(snapshot) == weights_of(hub.models["org/b"])
    assert all(file.is_symlink() for file in snapshot.glob("*.safetensors"))
    assert not list((tmp_path / "hub").rglob("*.incomplete*"))
    asked = len(hub.ranges)
    assert locate_model("org/b", "model") == snapshot
    merge(request(), out=tmp_path / "again")
    assert len(hub.ranges) == asked
