"""Malformed inputs by hand: each is one line that names the file and the cause, with nothing left behind."""

import json
import os
from pathlib import Path

import pytest
from faults import TOKENIZER, no_hang, snapshot, weights, write_varied_models

from gemma2.core.errors import Gemma2Error
from gemma2.core.home import cache_folder
from gemma2.core.outputs import digests, manifest
from gemma2.merging import MergeRequest, engine, merge


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "versions", dict)
    monkeypatch.setattr(manifest, "metadata_version", lambda: "test")
    return write_varied_models(tmp_path)


def put(path, value):
    """A JSON document in place of a file, with some keys of the original."""
    known = json.loads((path).read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | value))


def change_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def place_a_tensor(root, file):
    index = root / "rl-1/model.safetensors.index.json"
    put(index, {"weight_map": json.loads(index.read_text())["weight_map"] | {"model.norm.weight": file}})


def replace_by(root, name, make):
    (root / name).unlink()
    make(root / name)


def other_tokenizer(root, **keys):
    (root / "rl-2/tokenizer.json").write_text(json.dumps(TOKENIZER | keys))


DIGITS = "9" * 5000  # Python refuses to convert them
MALFORMED = {
    "NUL in the name of a shard": (lambda root: place_a_tensor(root, "a\x00b"), r"in a\x00b, not a file name"),
    "line break in the name of a shard": (lambda root: place_a_tensor(root, "a\nb"), r"in a\nb, not a file name"),
    "half a character in the name of a shard": (lambda root: place_a_tensor(root, "\ud800"), "not a file name"),
    "name of a shard too long": (lambda root: place_a_tensor(root, "a" * 5000), "not a file name"),
    "endless number in a header": (
        lambda root: change_header(root / "rl-2/model.safetensors", lambda text: text.replace(b"[8]", DIGITS.encode())),
        "rl-2/model.safetensors: the header is not JSON (ValueError)",
    ),
    "endless number in a configuration": (
        lambda root: (root / "rl-2/config.json").write_text(f'{{"a": {DIGITS}}}'),
        "rl-2/config.json is not readable JSON (JSONDecodeError)",
    ),
    "endless number in a manifest": (
        lambda root: (root / "rl-2/gemma2.json").write_text(f'{{"a": {DIGITS}}}'),
        "rl-2/gemma2.json is not readable JSON (JSONDecodeError)",
    ),
    "deep header": (
        lambda root: change_header(root / "rl-2/model.safetensors", lambda text: b'{"a":' + b"[" * 100_000),
        "the header is not JSON (RecursionError)",
    ),
    "deep manifest": (
        lambda root: (root / "rl-2/gemma2.json").write_text("[" * 100_000),
        "rl-2/gemma2.json is not readable JSON (JSONDecodeError)",
    ),
    "half a character in the name of a tensor": (
        lambda root: change_header(
            root / "rl-2/model.safetensors", lambda text: text.replace(b'"model.norm.weight"', rb'"model.\ud800"')
        ),
        r"the name model.\ud800 is not Unicode text",
    ),
    "manifest that is a folder": (
        lambda root: replace_by(root, "rl-2/gemma2.json", Path.mkdir),
        "rl-2/gemma2.json cannot be read (Is a directory)",
    ),
    "weights that are a folder": (
        lambda root: replace_by(root, "rl-2/model.safetensors", Path.mkdir),
        "rl-2/model.safetensors is not a regular file",
    ),
    "weights that are a pipe": (
        lambda root: replace_by(root, "rl-2/model.safetensors", os.mkfifo),
        "rl-2/model.safetensors is not a regular file",
    ),
    "weights that are a device": (
        lambda root: replace_by(root, "rl-2/model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "rl-2/model.safetensors is not a regular file",
    ),
    "configuration that is a pipe": (
        lambda root: replace_by(root, "rl-2/config.json", os.mkfifo),
        "rl-2 holds no config.json",
    ),
    "control characters in a configuration": (
        lambda root: put(root / "rl-2/config.json", {"hidden_size": "\x1b[2J"}),
        r"hidden_size is \x1b[2J, but",
    ),
    "status that is a book": (
        lambda root: put(root / "rl-2/gemma2.json", {"status": "x" * 100_000}),
        "is an unfinished output (status 'xxx",
    ),
    "tokens without content": (lambda root: other_tokenizer(root, added_tokens=[None]), "description of a tokenizer"),
    "merges that are not a list": (
        lambda root: other_tokenizer(root, model={"vocab": {}, "merges": 1}),
        "description of a tokenizer",
    ),
    "a vocabulary of lists": (
        lambda root: other_tokenizer(root, model={"vocab": [[[1], 2]]}),
        "description of a tokenizer",
    ),
    "rank_pattern that is a list": (
        lambda root: put(root / "lora/adapter_config.json", {"rank_pattern": [1]}),
        "adapter_config.json: rank_pattern is [1], not a dict",
    ),
    "modules_to_save that is a number": (
        lambda root: put(root / "lora/adapter_config.json", {"modules_to_save": 5}),
        "adapter_config.json: modules_to_save is 5, not a list",
    ),
    "an alpha that no float holds": (
        lambda root: put(root / "lora/adapter_config.json", {"lora_alpha": 10**400}),
        "not a positive number",
    ),
    "a rank that no float holds": (
        lambda root: put(root / "lora/adapter_config.json", {"r": 10**400}),
        "not a positive number",
    ),
    "an adapted model of no architecture": (
        lambda root: put(root / "rl-2/config.json", {"architectures": 5}),
        "rl-2/config.json does not name one architecture (5)",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_file_malformed_by_hand_is_refused(root, name):
    damage, message = MALFORMED[name]
    damage(root)
    before = snapshot(root)
    models = (root / "rl-1", Path(f"{root}/rl-2+{root}/lora"))
    with pytest.raises(Gemma2Error) as caught, no_hang():
        merge(MergeRequest(method="linear", models=models), out=root / "out")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert snapshot(root) == before


@pytest.mark.parametrize("path", ["\x00", "\ud800", "a\nb", "", "..", "/dev/zero", 5, None])
@pytest.mark.parametrize("weights", ["blake3:0", 5, None])
def test_a_recorded_parent_that_is_not_a_path_is_ignored(root, path, weights):
    for name in ("rl-1", "rl-2"):
        put(root / name / "gemma2.json", {"parents": [{"role": "policy", "path": path, "weights": weights}]})
    request = MergeRequest(method="warp", models=(root / "rl-1", root / "rl-2"))
    with pytest.raises(Gemma2Error, match=r"no common parent|it is missing or has other weights"):
        merge(request, out=root / "out")


@pytest.mark.parametrize("entry", [5, None, "x", []])
def test_a_manifest_with_a_malformed_record_of_a_file_is_refused(root, entry):
    put(root / "rl-2/gemma2.json", {"files": {"model.safetensors": entry}})
    with pytest.raises(Gemma2Error, match=r"gemma2\.json is not a gemma2 manifest"):
        merge(MergeRequest(method="linear", models=(root / "rl-2",)), out=root / "out")


@pytest.mark.parametrize("entry", [{"digest": 5}, {"size": None, "digest": None}])
def test_malformed_digests_in_a_manifest_are_computed_again(root, entry):
    put(root / "rl-2/gemma2.json", {"files": {"model.safetensors": entry}})
    merge(MergeRequest(method="linear", models=(root / "rl-2",)), out=root / "out")
    parents = json.loads((root / "out/gemma2.json").read_text())["parents"]
    (root / "rl-2/gemma2.json").unlink()
    assert parents[0]["weights"] == digests.digest_weights(root / "rl-2")


def test_paths_that_are_not_utf_8_are_merged_and_recorded(root):
    odd = root / os.fsdecode(b"rl-\xff")
    (root / "rl-1").rename(odd)
    merge(MergeRequest(method="linear", models=(odd, root / "rl-2")), out=root / os.fsdecode(b"out-\xff"))
    recorded = manifest.read_manifest(root / os.fsdecode(b"out-\xff"))
    assert [parent["path"] for parent in recorded["parents"]] == [os.fsdecode(b"../rl-\xff"), "../rl-2"]


@pytest.mark.parametrize("damage", ["values", "half", "empty", "other"])
def test_sums_of_a_damaged_cache_are_computed_again(root, damage):
    request = MergeRequest(method="slerp", models=(root / "rl-1", root / "rl-2"), base=root / "base")
    merge(request, out=root / "out")
    expected = weights(root / "out")
    (cached,) = cache_folder("products").glob("*.json")
    text = cached.read_text()
    at = text.index("[") + 1
    changed = {"values": f"{text[:at]}9{text[at:]}", "half": text[: len(text) // 2], "empty": "", "other": "{}"}[damage]
    cached.write_text(changed)
    merge(request, out=root / "out", force=True)
    assert weights(root / "out") == expected
    assert cached.read_text() == text
