"""Merges of hub models that begin before the models are whole: same bytes, and nothing half-written counts as whole."""

import errno
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub
from model_files import entries, random_arrays, safetensors_bytes, write_model
from tokenizer_models import write_tokenizer
from waiting import PATIENCE

from gemma2.core.errors import InputError, OutputError
from gemma2.core.home import cache_folder
from gemma2.core.outputs.hub import locate_model
from gemma2.core.progress import SILENT
from gemma2.merging import MergeRequest, merge, plan_merge
from gemma2.merging.inputs.checkpoint import Reader
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.merging.recipes.run_recipe import merge_recipe
from gemma2.merging.remote import hub_requests, hub_stream
from gemma2.merging.remote.open_arrivals import arrivals_of

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    **{f"model.layers.{layer}.mlp.up_proj.weight": (48, 32) for layer in range(3)},
    **{f"model.layers.{layer}.input_layernorm.weight": (32,) for layer in range(3)},
    "model.norm.weight": (32,),
}


class Notes(type(SILENT)):
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


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("slerp", {"base": Path("org/base")}),
        ("ties", {"base": Path("org/base")}),
        ("ties", {"base": Path("org/base"), "granularity": "model"}),
        ("dare", {"base": Path("org/base")}),
        ("sce", {"base": Path("org/base")}),
        ("nuslerp", {}),
        ("linear", {"dtype": "bfloat16"}),
    ],
)
def test_every_kind_of_stream_gives_the_same_bytes(hub, tmp_path, method, options):
    merge(request(method, **options), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path, method, **options)


@pytest.mark.parametrize("seed", range(12))
def test_random_models_and_failures_give_the_same_bytes(hub, tmp_path, monkeypatch, seed):
    monkeypatch.setattr(hub_stream, "PAUSES", (0.0,) * 20)
    chance = random.Random(seed)
    shapes = {
        f"model.layers.{layer}.{name}": tuple(chance.randint(1, 40) for _ in range(rank))
        for layer in range(chance.randint(1, 4))
        for name, rank in (("mlp.weight", 2), ("norm.weight", 1))
    }
    shapes |= {"model.embed_tokens.weight": (chance.randint(1, 90), 16), "model.norm.weight": (16,)}
    for name in ("a", "b"):
        folder = tmp_path / "random" / name
        dtype = chance.choice(["F32", "BF16", "F16"])
        write_model(folder, random_arrays(chance.randrange(99), shapes=shapes), dtype, shards=chance.randint(1, 4))
        hub.models[f"org/{name}"] = folder
    hub.fault = lambda *span: chance.choice([None, None, None, None, "cut", 503, 429])
    merge(request("nuslerp", threads=chance.randint(1, 4)), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path, "nuslerp")


def test_merging_begins_before_the_last_byte_has_arrived(hub, tmp_path):
    """The bytes of the last layer are held back until the merge has reported that it merged something."""
    merged = threading.Event()
    held = []

    def hold(name, first, end):
        if name == "a" and first > 20_000:
            held.append(first)
            assert merged.wait(PATIENCE)

    hub.fault = hold
    merge(request(), out=tmp_path / "out", progress=Notes(merged.set), cut=4096)
    assert held
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path)


def test_a_refusal_comes_before_any_byte_of_a_weight(hub, tmp_path):
    write_model(hub.models["org/b"], random_arrays(2, shapes=SHAPES), config={"hidden_size": 16}, shards=3)
    with pytest.raises(InputError, match="hidden_size"):
        merge(request(), out=tmp_path / "out")
    data = min(first for name, first, _ in hub.ranges if first)
    assert all(end <= max(64, data + 4096) and first in (0, 64) for name, first, end in hub.ranges)
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_headers_only_and_shows_the_paths_of_the_cache(hub, tmp_path):
    plan = plan_merge(request(), tmp_path / "out")
    assert [model.path.name for model in plan.models] == [COMMIT, COMMIT]
    assert {first for _, first, _ in hub.ranges} == {0, 64}
    assert plan.describe()["bytes_to_read"] == plan_merge(request(), tmp_path / "out").input_bytes


def test_a_lost_connection_is_one_line_and_the_next_run_fetches_only_what_is_missing(hub, tmp_path):
    size = (hub.models["org/a"] / "model.safetensors").stat().st_size
    hub.fault = lambda name, first, end: 503 if name == "a" and first > size // 2 else None
    with pytest.raises(
        InputError, match=r"the connection to the hub was lost 4 times in a row .*what has arrived is kept"
    ):
        merge(request(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    snapshot = tmp_path / "hub" / "models--org--a" / "snapshots" / COMMIT
    assert not list(snapshot.glob("*.safetensors"))
    hub.fault = lambda *span: None
    hub.sent = 0
    merge(request(), out=tmp_path / "out")
    total = sum(len(data) for name in "ab" for data in weights_of(hub.models[f"org/{name}"]).values())
    assert hub.sent < total * 3 // 4
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path)


def test_a_file_that_changed_on_the_server_is_refused(hub, tmp_path):
    hub.fault = lambda name, first, end: "etag" if name == "a" and first > 3000 else None
    with pytest.raises(
        InputError, match=r"model 1 org/a: model.safetensors changed on the server while it was fetched"
    ):
        merge(request(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bytes_without_the_stated_digest_never_become_a_model(hub, tmp_path):
    hub.wrong_digest = True
    with pytest.raises(InputError, match="do not have the digest that the hub states; merge again: it is fetched anew"):
        merge(request(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "hub").rglob("snapshots/*/*.safetensors"))


def test_listed_ranges_that_were_lost_are_found_by_the_digest_and_fetched_anew(hub, tmp_path):
    hub.fault = lambda name, first, end: 404 if name == "a" and first > 3000 else None
    with pytest.raises(InputError):
        merge(request(), out=tmp_path / "out")
    hub.fault = lambda *span: None
    partial = next((tmp_path / "hub" / "models--org--a" / "blobs").glob("*.incomplete"))
    (partial.parent / f"{partial.name}.ranges").write_text(f"{partial.stat().st_size}\n0 {partial.stat().st_size}\n")
    with pytest.raises(InputError, match="fetched anew"):
        merge(request(), out=tmp_path / "out")
    merge(request(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path)


def test_a_server_without_ranges_is_said_and_the_model_fetched_whole(hub, tmp_path):
    hub.fault = lambda *span: "whole"
    notes = Notes()
    merge(request(), out=tmp_path / "out", progress=notes)
    said = "model 1 org/a is fetched whole before the merge: the server sends whole files only"
    assert said in notes.lines
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path)
    assert not list((tmp_path / "hub").rglob("*.incomplete*"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_file_has_the_message_of_a_refused_model(hub, tmp_path, status):
    hub.fault = lambda name, first, end: status if name == "b" else None
    with pytest.raises(InputError, match=r"^model 2 org/b"):
        merge(request(), out=tmp_path / "out")


def test_an_unknown_model_has_the_message_of_today(hub, tmp_path):
    with pytest.raises(InputError) as streamed:
        merge(request(names=("org/a", "org/missing")), out=tmp_path / "out")
    with pytest.raises(InputError) as plain:
        merge(request(names=("org/a", "org/missing"), stream=False), out=tmp_path / "out")
    assert str(streamed.value) == str(plain.value)


def test_offline_the_cache_is_used_or_the_message_of_today_comes(hub, tmp_path, monkeypatch):
    merge(request(), out=tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    merge(request(), out=tmp_path / "again")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "out")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids fetching it"):
        merge(request(names=("org/a", "org/base")), out=tmp_path / "more")


def test_a_full_disk_is_refused_before_and_said_during_the_fetch(hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("gemma2.merging.remote.hub_stream.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"in the hub's cache .*, which has 100 B free"):
        merge(request(), out=tmp_path / "out")
    monkeypatch.setattr("gemma2.merging.remote.hub_stream.disk_usage", shutil.disk_usage)
    true_write = os.pwrite

    def full(descriptor, data, place):
        if place > 4000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true_write(descriptor, data, place)

    monkeypatch.setattr("gemma2.merging.remote.partial_file.os.pwrite", full)
    with pytest.raises(OutputError, match="No space left on device; free some space for the cache"):
        merge(request(), out=tmp_path / "out")


def test_two_processes_do_not_fetch_one_file(hub, tmp_path):
    with arrivals_of(True, print) as first:
        first.locate(Path("org/a"), "model 1")
        with pytest.raises(InputError, match="being fetched by another gemma2 process; wait for it, or merge without"):
            plan_merge(request(), tmp_path / "out")


def test_an_adapter_and_its_model_stream_too(hub, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    factors = random_arrays(5, shapes={f"{name}A.weight": (4, 32), f"{name}B.weight": (48, 4)})
    (lora / "adapter_model.safetensors").write_bytes(safetensors_bytes(entries(factors, "F32")))
    hub.models["org/lora"] = lora
    merge(request(names=("org/a+org/lora", "org/b")), out=tmp_path / "out")
    local = [Path(f"{hub.models['org/a']}+{hub.models['org/lora']}"), hub.models["org/b"]]
    merge(request(names=local, stream=False), out=tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


def test_the_records_are_those_of_a_merge_of_the_cached_models(hub, tmp_path):
    merge(request(), out=tmp_path / "out")
    merge(request(stream=False), out=tmp_path / "plain")
    first, second = (json.loads((tmp_path / name / "gemma2.json").read_text()) for name in ("out", "plain"))
    for key in ("parents", "config", "summary"):
        assert first[key] == second[key]
    assert first["parents"][0]["hub"] == f"org/a@{COMMIT}"


def test_a_recipe_repeats_a_streamed_merge_and_refuses_other_inputs(hub, tmp_path):
    merge(request(), out=tmp_path / "out")
    recipe = read_recipe(tmp_path / "out" / "merge.yaml", chosen={"stream": True})
    shutil.rmtree(tmp_path / "hub")
    (result,) = merge_recipe(recipe, out=tmp_path / "again")
    assert weights_of(result.outputs[0]) == weights_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    write_model(hub.models["org/b"], random_arrays(9, shapes=SHAPES), shards=3)
    hub.digests.clear()
    with pytest.raises(InputError, match="is not the model that the recipe records"):
        merge_recipe(recipe, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_products_of_a_streamed_merge_serve_the_next_one(hub, tmp_path):
    """One file of products: the second merge has the key of the first, though its models were whole from the start."""
    folder = cache_folder("products")
    merge(request("slerp", base=Path("org/base")), out=tmp_path / "out")
    assert len(list(folder.glob("*.json"))) == 1
    merge(request("slerp", base=Path("org/base"), t=0.2), out=tmp_path / "other")
    assert len(list(folder.glob("*.json"))) == 1


def test_a_file_that_another_revision_has_brought_is_not_fetched_again(hub, tmp_path):
    merge(request(), out=tmp_path / "out")
    (tmp_path / "hub" / "models--org--a" / "snapshots" / COMMIT / "model.safetensors").unlink()
    asked = len(hub.ranges)
    merge(request(), out=tmp_path / "again")
    assert len(hub.ranges) == asked


def test_rows_that_follow_their_tokens_wait_for_their_bytes_too(hub, tmp_path, monkeypatch):
    for name, letters in (("a", "abcdefghij"), ("b", "jihgfedcba")):
        write_tokenizer(hub.models[f"org/{name}"], letters)
    shapes = SHAPES | {"model.embed_tokens.weight": (16, 512)}
    for name in "ab":
        write_model(hub.models[f"org/{name}"], random_arrays(ord(name), shapes=shapes), config={"vocab_size": 16})
    for file in hub.models["org/b"].glob("model*-of-*"):
        file.unlink()
    (hub.models["org/b"] / "model.safetensors.index.json").unlink()
    asked, true_wait = threading.Event(), Reader.wait

    def wait(reader, tensor, *span):
        if tensor.name == "model.embed_tokens.weight" and "org--b" in str(tensor.file):
            asked.set()
        true_wait(reader, tensor, *span)

    def hold(name, first, end):  # until the merge waits for it; one that does not wait reads zeros
        if name == "b" and 64 < first < 3000:
            asked.wait(PATIENCE)

    monkeypatch.setattr(Reader, "wait", wait)
    hub.fault = hold
    merge(request(tokenizer="org/a"), out=tmp_path / "out", progress=Notes(asked.set))
    assert weights_of(tmp_path / "out") == same_as_local(hub, tmp_path, tokenizer=str(hub.models["org/a"]))
