"""Digests: of tensors and not of files, read once per state of a file, and read again whenever anything differs."""

import json
import os
import shutil

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import save_file
from waiting import until_kept

from gemma2.core.errors import InputError
from gemma2.core.outputs import digest_cache, digests
from gemma2.core.outputs.digests import WeightsDigest, digest_input, digest_weights
from gemma2.core.outputs.hashing import HASHED_BYTES
from gemma2.core.outputs.model_identity import identity_of
from gemma2.core.outputs.safetensors_header import read_header

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(4, dtype=np.float16)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test alone; returns a function that forgets what this process knows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def forget():
        monkeypatch.setattr(digest_cache, "_KNOWN", {})
        monkeypatch.setattr(digest_cache, "_LINES", {})
        monkeypatch.setattr(digest_cache, "_READ", {})

    forget()
    return forget


@pytest.fixture
def read(monkeypatch):
    """The files that are read, in order."""
    found = []
    plain, missing = digests.digest_file, digests.WeightsDigest._read_missing

    def read_missing(own, path, threads):
        found.append(path)
        missing(own, path, threads)

    monkeypatch.setattr(digests, "digest_file", lambda path, threads=1: (found.append(path), plain(path, threads))[1])
    monkeypatch.setattr(digests.WeightsDigest, "_read_missing", read_missing)
    return found


def model(directory, tensors=None, shards=1, padding=0):
    """A model in one or more files, the header padded with spaces."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = TENSORS if tensors is None else tensors
    names = sorted(tensors)
    for number in range(shards):
        path = directory / (f"model-{number}.safetensors" if shards > 1 else "model.safetensors")
        save_file({name: tensors[name] for name in names[number::shards]}, path)
        if padding:
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            text = data[8 : 8 + length].ljust(length + padding)
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return directory


def test_the_digest_of_weights_is_by_hand_that_of_names_dtypes_shapes_and_bytes(tmp_path):
    lines = [
        json.dumps(["a", "F16", [4], blake3(TENSORS["a"].tobytes()).hexdigest()]),
        json.dumps(["b", "F32", [2, 3], blake3(TENSORS["b"].tobytes()).hexdigest()]),
    ]
    assert digest_weights(model(tmp_path / "m")) == "blake3:" + blake3("\n".join(lines).encode()).hexdigest()


def test_the_digest_of_a_long_tensor_is_by_hand_that_of_the_digests_of_its_pieces(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, 2 * HASHED_BYTES + 5, dtype=np.uint8)
    text = values.tobytes()
    pieces = [text[begin : begin + HASHED_BYTES] for begin in range(0, len(text), HASHED_BYTES)]
    tensor = blake3(b"".join(blake3(piece).digest() for piece in pieces)).hexdigest()
    line = json.dumps(["a", "U8", [len(text)], tensor])
    expected = "blake3:" + blake3(line.encode()).hexdigest()
    assert len(pieces) == 3
    assert digest_weights(model(tmp_path / "m", {"a": values})) == expected


def test_what_passes_by_in_any_order_gives_the_same_digest_and_is_not_read_again(tmp_path, monkeypatch):
    sizes = {"a": 3 * HASHED_BYTES, "b": HASHED_BYTES + 7, "c": 9, "d": 0}
    tensors = {name: np.random.default_rng(1).integers(0, 255, size, dtype=np.uint8) for name, size in sizes.items()}
    path = model(tmp_path / "m", tensors)
    expected = digest_weights(path)
    shutil.copytree(path, tmp_path / "again")
    passing = WeightsDigest(tmp_path / "again")
    held = read_header(tmp_path / "again/model.safetensors")
    for name, first, stop in [
        ("a", 2 * HASHED_BYTES, 3 * HASHED_BYTES),
        ("b", 0, sizes["b"]),
        ("a", 0, 2 * HASHED_BYTES),
        ("c", 0, 9),
        ("d", 0, 0),
    ]:
        passing.add(held[name], first, memoryview(tensors[name])[first:stop])
    monkeypatch.setattr(digests, "_digest_piece", lambda *_: pytest.fail("read again"))
    assert passing.finish() == expected


@pytest.mark.parametrize(("first", "stop"), [(0, 5), (1, HASHED_BYTES), (HASHED_BYTES, 2 * HASHED_BYTES)])
def test_pieces_that_did_not_pass_by_whole_are_read(tmp_path, first, stop):
    values = np.random.default_rng(2).integers(0, 255, 3 * HASHED_BYTES, dtype=np.uint8)
    path = model(tmp_path / "m", {"a": values})
    passing = WeightsDigest(path)
    passing.add(read_header(path / "model.safetensors")["a"], first, memoryview(values)[first:stop])
    assert passing.finish(threads=2) == digest_weights(model(tmp_path / "other", {"a": values}))


def test_padding_shards_and_names_of_files_do_not_matter(tmp_path):
    expected = digest_weights(model(tmp_path / "one"))
    assert digest_weights(model(tmp_path / "padded", padding=64)) == expected
    assert digest_weights(model(tmp_path / "shards", shards=2)) == expected
    assert digest_input(tmp_path / "padded/model.safetensors") != digest_input(tmp_path / "one/model.safetensors")


@pytest.mark.parametrize(
    "changed",
    [
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["a"], "b": TENSORS["b"].reshape(3, 2)},
        {"a": TENSORS["a"], "b": TENSORS["b"].view(np.int32)},
        {"a": TENSORS["a"], "b": TENSORS["b"] + 1},
        {"a": TENSORS["a"]},
    ],
    ids=["name", "shape", "dtype", "bytes", "fewer"],
)
def test_every_part_of_a_tensor_counts(tmp_path, changed):
    assert digest_weights(model(tmp_path / "one")) != digest_weights(model(tmp_path / "other", changed))


def test_of_two_copies_of_a_tensor_the_one_in_the_index_counts(tmp_path):
    both = model(tmp_path / "both", {"b": TENSORS["b"]})
    save_file({"a": TENSORS["a"], "b": TENSORS["b"] * 2}, both / "extra.safetensors")
    index = both / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "extra.safetensors", "b": "model.safetensors"}}))
    assert digest_weights(both) == digest_weights(model(tmp_path / "one"))
    index.write_text(json.dumps({"weight_map": {"a": "extra.safetensors", "b": "extra.safetensors"}}))
    assert digest_weights(both) != digest_weights(tmp_path / "one")
    index.write_text("{")
    with pytest.raises(InputError, match="is not an index of shards"):
        digest_weights(both)


# --- read once, and again whenever anything differs -------------------------------------------------------------------


def test_a_file_is_read_once_by_all_processes(tmp_path, cache, read):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    until_kept(path)
    first = digest_input(path)
    cache()  # another process
    assert digest_input(path) == first
    assert read == [path]


CHANGES = {
    "written in place": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "written in place, times set back": lambda path: _written_with_old_times(path),
    "replaced": lambda path: (path.with_name("new").write_bytes(b"]["), path.with_name("new").replace(path)),
    "mode": lambda path: path.chmod(0o600),
    "touched": lambda path: os.utime(path),
    "linked": lambda path: os.link(path, path.with_name("link")),
}


def _written_with_old_times(path):
    old = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_was_touched_in_any_way_is_read_again(tmp_path, cache, read, change):
    path = tmp_path / "rows.jsonl"
    path.write_text("[]")
    until_kept(path)
    digest_input(path)
    change(path)
    cache()
    assert digest_input(path) == "blake3:" + blake3(path.read_bytes()).hexdigest()
    assert read == [path, path]


def test_a_copy_is_read_again(tmp_path, read):
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "rows.jsonl"
    path.write_text("[]")
    until_kept(path)
    digest_input(path)
    shutil.copytree(path.parent, tmp_path / "two")
    digest_input(tmp_path / "two" / "rows.jsonl")
    assert read == [path, tmp_path / "two" / "rows.jsonl"]


def test_two_writes_in_one_tick_of_the_clock_are_told_apart(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("[]")
    stamp = digest_cache.stamp_of(path)
    monkeypatch.setattr(digest_cache, "stamp_of", lambda path: stamp)  # a clock that does not tick
    monkeypatch.setattr(digest_cache.time, "time_ns", lambda: stamp[3])
    before = digest_input(path)
    path.write_text("{}")
    assert digest_input(path) == "blake3:" + blake3(b"{}").hexdigest() != before


def test_times_in_whole_seconds_are_trusted_only_after_two(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("[]")
    second = 10**18
    monkeypatch.setattr(digest_cache, "stamp_of", lambda path: (1, 2, second, second))
    monkeypatch.setattr(digest_cache.time, "time_ns", lambda: second + 1_500_000_000)
    digest_input(path)
    path.write_text("{}")
    assert digest_input(path) == "blake3:" + blake3(b"{}").hexdigest()


def test_a_file_that_is_written_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("[]")
    until_kept(path)
    plain = digests.digest_file

    def slow(path, threads):
        found = plain(path, threads)
        path.write_text("{}")
        return found

    monkeypatch.setattr(digests, "digest_file", slow)
    digest_input(path)
    monkeypatch.undo()
    assert digest_input(path) == "blake3:" + blake3(b"{}").hexdigest()


def test_a_torn_or_forged_line_of_the_log_is_skipped(tmp_path, cache, read):
    path = tmp_path / "rows.jsonl"
    path.write_text("[]")
    until_kept(path)
    digest_input(path)
    log = tmp_path / "cache/gemma2/digests/log"
    line = log.read_text()
    log.write_text(line.replace("blake3:", "blake3:0", 1) + line[:40])
    cache()
    assert digest_input(path) == "blake3:" + blake3(b"[]").hexdigest()
    assert read == [path, path]


def test_the_log_names_no_path_and_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(digest_cache, "LOG_BYTES", 2000)
    for number in range(40):
        path = tmp_path / f"secret-{number}"
        path.write_text(str(number))
    until_kept(path)
    for number in range(40):
        digest_input(tmp_path / f"secret-{number}")
    text = (tmp_path / "cache/gemma2/digests/log").read_text()
    assert "secret" not in text and str(tmp_path) not in text
    assert len(text) <= 2200


def test_without_a_cache_that_can_be_written_the_digests_are_right(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "rows.jsonl"
    path.write_text("[]")
    until_kept(path)
    assert digest_input(path) == "blake3:" + blake3(b"[]").hexdigest()


# --- a model is everything that decides what it computes --------------------------------------------------------------

DECIDES = {
    "config.json": '{"final_logit_softcapping": 8.0}',
    "generation_config.json": '{"eos_token_id": [1, 107]}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"add_bos_token": false}',
    "tokenizer.model": "x",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ x }}",
    "additional_chat_templates/tools.jinja": "{{ y }}",
    "a_file_that_nobody_has_heard_of.json": "{}",
}
DECIDES_NOTHING = {
    "README.md": "# A model",
    "LICENSE": "Apache-2.0",
    "front.png": "picture",
    "metrics.jsonl": "{}",
    "training_args.bin": "x",
    "pytorch_model.bin": "the same weights, pickled",
    ".gitattributes": "x",
    "gemma2.json": '{"status": "complete"}',
    "checkpoint-1/config.json": "{}",
}


@pytest.mark.parametrize(("name", "text"), DECIDES.items())
def test_a_file_that_decides_is_part_of_the_model(tmp_path, name, text):
    before = identity_of(model(tmp_path / "m"))
    (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "m" / name).write_text(text)
    after = identity_of(tmp_path / "m")
    assert (after.weights, set(after.files)) == (before.weights, {*before.files, name})
    (tmp_path / "m" / name).write_text(text.replace("8.0", "30.0").replace("107", "106") + " ")
    assert identity_of(tmp_path / "m") != after or name.endswith("config.json")


@pytest.mark.parametrize(("name", "text"), DECIDES_NOTHING.items())
def test_a_file_that_decides_nothing_is_not(tmp_path, name, text):
    before = identity_of(model(tmp_path / "m"))
    (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "m" / name).write_text(text)
    assert identity_of(tmp_path / "m") == before


def test_weights_in_another_format_count_where_there_are_no_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("one")
    before = identity_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("two")
    assert identity_of(tmp_path) != before


def test_layout_and_records_in_a_config_do_not_count_and_every_other_key_does(tmp_path):
    place = model(tmp_path / "m")
    config = {"vocab_size": 5, "transformers_version": "5.0", "new_key": 1}
    (place / "config.json").write_text(json.dumps(config))
    before = identity_of(place)
    (place / "config.json").write_text(
        json.dumps({"new_key": 1, "vocab_size": 5, "transformers_version": "5.1", "_name_or_path": "/x"}, indent=2)
    )
    assert identity_of(place) == before
    (place / "config.json").write_text(json.dumps(config | {"new_key": 2}))
    assert identity_of(place) != before
