"""Files read from the disk: the digests are those of the other readers, each file is read once, the cache follows."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lineages import base_model

from gemma2.core.outputs import digest_cache
from gemma2.core.outputs.digest_cache import stamp_of, store
from gemma2.core.outputs.digests import INDEX, digest_input, digest_weights
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.model_identity import deciding_files, identity_of
from gemma2.core.outputs.safetensors_header import encode_header, weight_files
from gemma2.posttrain.audit import disk_reading as reading
from gemma2.posttrain.audit.disk_reading import read_files, store_model, weights_of

PIECE = 64  # no size of a block, so that each read goes on through the page cache


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", PIECE)
    monkeypatch.setattr(reading, "SMALL", 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_digest_is_that_of_the_bytes_whatever_the_size(tmp_path, threads):
    sizes = [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 1000]
    files = {size: tmp_path / f"{size}.bin" for size in sizes}
    for size, path in files.items():
        path.write_bytes(os.urandom(size))
    read = read_files(files.values(), threads)
    assert {size: (read[path].size, read[path].digest) for size, path in files.items()} == {
        size: (size, digest_file(path)) for size, path in files.items()
    }


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 150), max_size=4), min_size=1, max_size=3))
def test_the_digest_of_tensors_is_that_of_the_model(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("model")
    for number, lengths in enumerate(shards):
        header, _ = encode_header({f"t{number}.{i}": ("U8", (length,)) for i, length in enumerate(lengths)})
        path = folder / f"model-{number}.safetensors"
        path.write_bytes(header + os.urandom(sum(lengths)))
    files = weight_files(folder)
    read = read_files(files, 2, with_tensors=files)
    assert weights_of(files, read, folder / INDEX) == digest_weights(folder)


def test_the_digests_of_settings_are_those_of_the_identity(tmp_path):
    model = base_model(tmp_path / "raw")
    read = read_files(deciding_files(model))
    assert {path.name: one.settings or one.digest for path, one in read.items()} == identity_of(model).files


@pytest.mark.parametrize("piece", [4096, 8192])
@pytest.mark.parametrize("small", [0, 4096])
def test_a_file_is_whole_past_the_page_cache_and_through_it(tmp_path, monkeypatch, piece, small):
    monkeypatch.setattr(reading, "PIECE", piece)
    monkeypatch.setattr(reading, "SMALL", small)
    files = [tmp_path / str(size) for size in (0, 1, 4095, 4096, 4097, 8192, 3 * 8192 + 5)]
    for path in files:
        path.write_bytes(os.urandom(int(path.name)))
    read = read_files(files)
    assert [read[path].digest for path in files] == [digest_file(path) for path in files]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")
def test_a_file_system_without_o_direct_is_read_too(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(os.urandom(10_000))
    opened, inner = [], os.open

    def refusing(name, flags, *rest, **more):
        opened.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return inner(name, flags, *rest, **more)

    monkeypatch.setattr(reading, "PIECE", 4096)
    monkeypatch.setattr(reading, "SMALL", 0)
    monkeypatch.setattr(reading.os, "open", refusing)
    assert read_files([path])[path].digest == digest_file(path)
    assert any(flags & os.O_DIRECT for flags in opened)


def test_a_file_with_several_names_is_read_once(tmp_path, monkeypatch):
    first = tmp_path / "first"
    first.write_bytes(b"x" * 100)
    (tmp_path / "linked").symlink_to(first)
    os.link(first, tmp_path / "hard")
    opened = []
    inner = reading._read_file
    monkeypatch.setattr(reading, "_read_file", lambda path, *rest: opened.append(path) or inner(path, *rest))
    read = read_files([first, tmp_path / "linked", tmp_path / "hard", first])
    assert len(opened) == 1
    assert {one.digest for one in read.values()} == {digest_file(first)} and len(read) == 3


def test_what_cannot_be_read_has_a_cause(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    read = read_files([tmp_path, tmp_path / "pipe", tmp_path / "gone", tmp_path / "nowhere"])
    assert [(one.problem, one.gone) for one in read.values()] == [
        ("is not a regular file", False),
        ("is not a regular file", False),
        ("No such file or directory", True),
        ("No such file or directory", True),
    ]


def aged(path, seconds=10):
    """Make a file old enough for its digest to be remembered."""
    before = path.stat().st_mtime - seconds
    os.utime(path, (before, before))


def test_what_is_found_on_the_disk_replaces_what_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma2.core.outputs.digest_cache._not_before", lambda stamp: 0)
    model = base_model(tmp_path / "raw")
    weights = model / "model.safetensors"
    for kind, wrong in (("file", "blake3:file"), ("tensors", "blake3:tensors")):  # as after rot: the stamp is the same
        store(kind, [weights], [stamp_of(weights)], 1, wrong)
    assert (digest_input(weights), digest_weights(model)) == ("blake3:file", "blake3:tensors")
    read = read_files([weights], with_tensors=[weights])
    found = weights_of([weights], read, model / INDEX)
    store_model(model, [weights], read, found)
    for _ in range(2):
        assert digest_input(weights) == digest_file(weights) == read[weights].digest
        assert digest_weights(model) == found
        for memory in ("_KNOWN", "_LINES", "_READ"):  # another process reads the log
            monkeypatch.setattr(digest_cache, memory, {})


def test_a_digest_is_not_stored_of_a_file_that_was_written_since(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma2.core.outputs.digest_cache._not_before", lambda stamp: 0)
    path = tmp_path / "x"
    path.write_bytes(b"one")
    before = stamp_of(path)
    path.write_bytes(b"other")
    store("file", [path], [before], 1, "blake3:one")
    assert digest_input(path) == digest_file(path)


def test_an_interrupt_ends_the_reading(tmp_path, interrupting):
    for i in range(20):
        (tmp_path / f"{i}.bin").write_bytes(b"x" * 20 * PIECE)
    with pytest.raises(KeyboardInterrupt):
        read_files(sorted(tmp_path.iterdir()), 2, interrupting(after=10 * PIECE))
