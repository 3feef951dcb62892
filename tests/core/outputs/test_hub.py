"""Hub ids from a cache in the hub's layout, without a network; and every failure in one line."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from model_files import CONFIG, random_arrays, read_model, write_model

from gemma2.core.errors import InputError
from gemma2.core.outputs import hub
from gemma2.core.outputs.hub import is_hub_id, locate_model
from gemma2.merging.inputs.checkpoint import open_checkpoint

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """models--owner--tiny with two revisions: its files are links into blobs, like those of the hub's library."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = hub / "models--owner--tiny"
    for commit, ref in ((COMMIT, "main"), (OTHER, "v2")):
        model = write_model(tmp_path / "made" / ref, random_arrays(len(ref)))
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        for file in model.iterdir():
            blob = repo / "blobs" / f"{ref}-{file.name}"
            file.rename(blob)
            (folder / file.name).symlink_to(os.path.relpath(blob, folder))
    return repo


def test_a_hub_id_is_found_in_the_cache_and_opens_as_a_model(cache):
    path = locate_model("owner/tiny", "model 1")
    assert path == cache / "snapshots" / COMMIT
    assert open_checkpoint(path, "model 1").config == CONFIG
    expected = random_arrays(4)["model.norm.weight"].astype("float32")
    assert read_model(path)["model.norm.weight"] == pytest.approx(expected)


@pytest.mark.parametrize("revision", ["v2", OTHER])
def test_a_revision_is_a_branch_a_tag_or_a_commit(cache, revision):
    assert locate_model(f"owner/tiny@{revision}", "base") == cache / "snapshots" / OTHER


def test_a_directory_whose_name_looks_like_a_hub_id_stays_a_directory(cache, tmp_path):
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert locate_model("owner/tiny", "base").resolve() == tmp_path / "owner" / "tiny"
    # A misspelt name next to existing folders is a misspelt path: the hub is not asked.
    assert not is_hub_id("owner/tinny")
    assert locate_model("owner/tinny", "base").parts == ("owner", "tinny")


@pytest.mark.parametrize(
    "name", ["nowhere", "/a/b", "../a/b", "a/b/c", "a/b@", "a//b@x", ".a/b", "~/b", "a/b c", "a/b\n"]
)
def test_a_name_that_is_not_a_hub_id_stays_a_path_which_opening_refuses(cache, name):
    assert not is_hub_id(name)
    with pytest.raises(InputError, match="is not a directory; give the path of a model directory"):
        open_checkpoint(locate_model(name, "model 2"), "model 2")


@pytest.mark.parametrize("name", ["owner/other", "owner/tiny@v3"])
def test_offline_and_not_cached_is_one_line(cache, name):
    with pytest.raises(InputError) as caught:
        locate_model(name, "model 2")
    assert str(caught.value) == (
        f"model 2 {name} is not a directory here, it is not in the hub's cache, and HF_HUB_OFFLINE forbids fetching it"
        "; give a directory, or go online once"
    )


def test_a_partly_fetched_snapshot_is_refused(cache):
    (cache / "trees").mkdir()
    folder = cache / "snapshots" / COMMIT
    sizes = {name: (folder / name).stat().st_size for name in ("config.json", "model.safetensors")}
    (folder / "model.safetensors").unlink()
    tree = {name: {"size": size, "blob_id": "0" * 40} for name, size in sizes.items()}
    (cache / "trees" / f"{COMMIT}.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"only partly in the hub's cache|holds neither model\.safetensors"):
        open_checkpoint(locate_model("owner/tiny", "model 2"), "model 2")


class Response:
    """The attributes that the hub's errors read from a response."""

    def __init__(self):
        self.headers = {}

    request = None
    status_code = 404


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "is not a directory here, and the hub has no public model of that name; check"),
        ("GatedRepoError", "is gated on the hub; accept its terms on its page, then log in"),
        ("RevisionNotFoundError", "the hub has the model but not this revision; name a branch, tag or commit"),
        ("HfHubHTTPError", "could not be fetched from the hub (HfHubHTTPError); check the network"),
        ("LocalEntryNotFoundError", "is not a directory here, and the hub cannot be reached; check the network"),
        ("ConnectionError", "could not be fetched from the hub (ConnectionError); check the network"),
    ],
)
def test_an_error_of_the_hub_is_one_line_with_the_id(cache, monkeypatch, kind, message):
    from huggingface_hub import errors

    def fail(*args, **options):
        if kind == "ConnectionError":
            raise ConnectionError("two\nlines")
        maker = getattr(errors, kind)
        raise maker("two\nlines", response=Response()) if "Local" not in kind else maker("two\nlines")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        locate_model("owner/tiny", "model 2")
    assert str(caught.value).startswith("model 2 owner/tiny")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_weights_configuration_and_tokenizer_are_fetched(cache, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: asked.update(options) or repo)
    locate_model("owner/tiny", "base")
    safe = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    others = ["pytorch_model.bin", "model.gguf", "modeling_x.py", "flax_model.msgpack", "training_args.pt", "a.pkl"]
    assert list(filter_repo_objects(safe + others, allow_patterns=asked["allow_patterns"])) == safe


def test_a_directory_needs_no_network_library(tmp_path):
    code = (
        "import sys; from gemma2.core.outputs.hub import locate_model; "
        f"locate_model({str(tmp_path)!r}, 'base'); assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["tokenizer.pkl", "tokenizer.bin", "tokenizer.py", "tokenizer_code.py", "tokenizer", "model.bin", "a.pt"]
)
def test_neither_pickles_nor_code_are_fetched(name):
    assert not any(fnmatch(name, pattern) for pattern in hub.FETCHED)


def test_the_files_of_a_tokenizer_are_fetched():
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt", "merges.txt"):
        assert any(fnmatch(name, pattern) for pattern in hub.FETCHED), name
