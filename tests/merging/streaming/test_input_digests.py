"""What a merge records of its inputs is what it read: hashed on the way, and never read again for it."""

import threading

import numpy as np
import pytest
from model_files import added, random_arrays, write_model
from waiting import until_kept, wait_for

from gemma2.core.errors import OutputError
from gemma2.core.outputs import digest_cache, digests
from gemma2.core.outputs.digests import WeightsDigest, digest_weights
from gemma2.core.outputs.hashing import HASHED_BYTES
from gemma2.core.outputs.manifest import read_manifest
from gemma2.merging import MergeRequest, merge
from gemma2.merging.streaming import dense_stream, read_back

SHAPES = {
    "model.embed_tokens.weight": (2 * HASHED_BYTES // 16 + 8, 16),  # bf16: 4 pieces and a rest
    "model.layers.0.mlp.up_proj.weight": (48, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.mlp.up_proj.weight": (48, 16),
    "model.norm.weight": (16,),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A base and two policies, and no digest that this process knows."""
    base = random_arrays(0, shapes=SHAPES)
    write_model(tmp_path / "base", base, "BF16")
    for number in (1, 2):
        write_model(tmp_path / f"rl-{number}", added(base, random_arrays(number, 0.1, SHAPES)), "BF16")
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch):
    monkeypatch.setattr(digest_cache, "_KNOWN", {})
    monkeypatch.setattr(digest_cache, "_LINES", {})
    monkeypatch.setattr(digest_cache, "_READ", {})


def request(root, method, **options):
    base = {"base": root / "base"} if method != "linear" else {}
    return MergeRequest(method=method, models=(root / "rl-1", root / "rl-2"), **base, **options)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare", "sce"])
def test_the_recorded_digests_are_those_of_the_files(root, monkeypatch, tmp_path_factory, method):
    merge(request(root, method), out=root / "out")
    parents = {parent["path"]: parent["weights"] for parent in read_manifest(root / "out")["parents"]}
    forget(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("empty")))
    assert len(parents) == (2 if method == "linear" else 3)
    assert parents == {path: digest_weights(root / path.removeprefix("../")) for path in parents}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("method", ["linear", "slerp", "liti", "warp"])
def test_no_byte_is_read_again_for_a_digest(root, monkeypatch, method, threads):
    monkeypatch.setattr(digests, "_digest_piece", lambda *_: pytest.fail("read again"))
    models = {"models": (root / "rl-1",)} if method == "liti" else {}
    merge(MergeRequest(**{**vars_of(request(root, method, threads=threads)), **models}), out=root / "out")


def vars_of(one):
    return {"method": one.method, "models": one.models, "base": one.base, "threads": one.threads}


def test_inputs_that_are_known_are_not_hashed(root, monkeypatch):
    for name in ("base", "rl-1", "rl-2"):
        until_kept(root / name / "model.safetensors")
        digest_weights(root / name)
    hashed = []
    monkeypatch.setattr(digests, "_digest", lambda data: hashed.append(len(data)) or b"")
    merge(request(root, "slerp"), out=root / "out")
    assert hashed == []


def test_tensors_that_are_widened_are_read_for_the_digest(root, monkeypatch, tmp_path_factory):
    """A model in another format is converted before it is merged: its bytes do not pass by."""
    write_model(root / "rl-2", random_arrays(3, shapes=SHAPES), "F16")
    merge(request(root, "linear"), out=root / "out")
    parents = {parent["path"]: parent["weights"] for parent in read_manifest(root / "out")["parents"]}
    forget(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("empty")))
    assert parents["../rl-2"] == digest_weights(root / "rl-2")


def test_reading_ahead_can_be_stopped(root):
    stopped = threading.Event()
    stopped.set()
    passing = WeightsDigest(root / "base")
    passing.read(stopped)
    assert all(piece is None for pieces in passing._pieces.values() for piece in pieces)
    assert passing.finish() == digest_weights(root / "base")


def test_a_failure_ends_the_pass_ahead_and_is_the_error(root, monkeypatch):
    """The first group fails while pass 1 of the second one waits: the merge ends with the failure, not with a hang."""
    measure, going = dense_stream.Stream._measure, threading.Event()
    write, ended = dense_stream.Stream._write, []

    def slow(self, group, job):
        if group.name != "embed_tokens":
            going.set()
            assert self._stopped.wait(60)
        try:
            return measure(self, group, job)
        except dense_stream.Stopped:
            ended.append(group.name)
            raise

    def failing(self, *arguments):
        assert going.wait(60)
        write(self, *arguments)
        raise OutputError("the disk is gone", "look for it")

    monkeypatch.setattr(dense_stream.Stream, "_measure", slow)
    monkeypatch.setattr(dense_stream.Stream, "_write", failing)
    with pytest.raises(OutputError, match="the disk is gone"):
        merge(request(root, "slerp", threads=3), out=root / "out")
    assert ended
    assert not (root / "out").exists()


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_size_of_a_job_does_not_change_the_bytes(root, method):
    for number, cut in enumerate((None, 4096, 1 << 19)):
        merge(request(root, method), out=root / f"out-{number}", cut=cut)
    found = {(root / f"out-{number}" / "model.safetensors").read_bytes() for number in range(3)}
    assert len(found) == 1
    assert np.frombuffer(found.pop()[-32:], np.uint16).any()


def test_an_interrupt_while_the_read_back_starts_leaves_no_thread(root, monkeypatch):
    begin = read_back.ReadBack.start

    def interrupted(self):
        begin(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(read_back.ReadBack, "start", interrupted)
    before = {*threading.enumerate()}
    with pytest.raises(KeyboardInterrupt):
        merge(request(root, "linear"), out=root / "out")
    wait_for(lambda: {*threading.enumerate()} <= before)
