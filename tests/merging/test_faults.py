"""The state that a merge leaves when the system fails: every call that accesses a file fails once, in every place.

The compiled passes call the system's `pread` and `pwrite` themselves, out of reach of a patched `os`. There the system
itself refuses: a limit on the size of files ends a write short and then with EFBIG, and a descriptor that is exchanged
for one of an unmapped place in this process's memory answers with EIO.
"""

import linecache
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import faults
import pytest
from faults import (
    BROKEN,
    NO_SPACE,
    Faults,
    complete,
    exchanged_descriptor,
    judge_each_call,
    request,
    snapshot,
    temporaries,
    weights,
    write_models,
)
from processes import finish, start

from gemma2.core.errors import Gemma2Error, InputError, OutputError
from gemma2.core.outputs import manifest, staging
from gemma2.core.outputs.safetensors_header import read_header
from gemma2.merging import engine, merge
from gemma2.merging.inputs import checkpoint
from gemma2.merging.streaming import dense_stream, read_back, writer


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "versions", dict)  # reading them from the installed packages takes most of a tiny merge
    monkeypatch.setattr(manifest, "metadata_version", lambda: "test")
    return write_models(tmp_path)


@pytest.fixture
def direct(monkeypatch):
    """Outputs of any size bypass the page cache."""
    monkeypatch.setattr(writer, "DIRECT_BYTES", 0)
    monkeypatch.setattr(read_back, "DIRECT_BYTES", 0)


def fails(root, kind, message, method="slerp", **options):
    """A merge that must fail with one line, with nothing changed in `root`."""
    before = snapshot(root)
    with pytest.raises(kind) as caught:
        merge(request(root, method), out=root / "out", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(root) == before


# --- every call that touches a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "first"), [(NO_SPACE, 0), (BROKEN, 1)], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_one_failing_call_leaves_the_old_state_or_the_whole_result(root, monkeypatch, direct, code, first, force):
    """Every fifth call; `make torture` takes every one."""
    counts = judge_each_call(root, Faults(monkeypatch, root), code, force=force, dtype="float32", step=(first, 5))
    assert counts["tried"] >= 14
    assert counts["refused"] > 10
    assert counts["refused after the rename"] <= 3


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_calls_that_do_half_of_their_work_change_nothing(root, monkeypatch, method):
    counts = judge_each_call(root, Faults(monkeypatch, root), None, method)
    assert counts["carried on"] == counts["tried"] > 5


# --- the compiled passes ----------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size):
    """The system writes up to this offset of any file, a write across it ends short, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def found(kind, arguments):
    """The argument of a class, at any position."""
    return next(argument for argument in arguments if isinstance(argument, kind))


def around_the_stream(monkeypatch, block):
    """Let `block` hold while weights are read and written, after the files were made."""
    begin = engine._groups

    def groups(*arguments):
        with block(arguments[1:]):
            yield from begin(*arguments)

    monkeypatch.setattr(engine, "_groups", groups)


@pytest.mark.parametrize("method", ["slerp", "linear", "ties"])
@pytest.mark.parametrize("size", [4096, 4096 + 8192 + 1002, 4096 + 8192 + 4096])
@pytest.mark.parametrize("past_the_cache", [False, True], ids=["cached", "direct"])
def test_a_write_that_ends_short_and_then_fails(root, monkeypatch, request, method, size, past_the_cache):
    if past_the_cache:
        request.getfixturevalue("direct")
    around_the_stream(monkeypatch, lambda _: largest_file(size))
    fails(root, OutputError, "writing the output failed (", method)


@pytest.mark.parametrize("method", ["slerp", "linear", "ties"])
def test_a_write_that_the_disk_refuses(root, monkeypatch, method):
    def broken(arguments):
        return exchanged_descriptor(
            found(dense_stream.Output, arguments).writers[0].places["model.norm.weight"].descriptor
        )

    around_the_stream(monkeypatch, broken)
    fails(root, OutputError, "writing the output failed (Input/output error)", method)


@pytest.mark.parametrize("method", ["slerp", "linear", "ties"])
def test_a_read_that_the_disk_refuses(root, monkeypatch, method):
    path = root / "rl-2" / "model.safetensors"

    def broken(arguments):
        return exchanged_descriptor(found(checkpoint.Reader, arguments)._descriptors[path])

    around_the_stream(monkeypatch, broken)
    fails(root, InputError, f"reading {path} failed (Input/output error)", method)


@pytest.mark.parametrize("method", ["slerp", "linear", "ties", "liti"])
def test_an_input_that_shrinks_in_the_middle_of_the_stream(root, monkeypatch, method):
    path = root / "rl-1" / "model.safetensors"
    whole = path.read_bytes()

    @contextmanager
    def shrunk(_):
        os.truncate(path, len(whole) - 20_000)
        try:
            yield
        finally:
            path.write_bytes(whole)

    around_the_stream(monkeypatch, shrunk)
    models = {"models": (root / "rl-1",)} if method == "liti" else {}
    before = snapshot(root)
    with pytest.raises(InputError, match=f"{path} ended while model."):
        merge(request(root, method, **models), out=root / "out")
    assert snapshot(root) == before


# --- the read-back ----------------------------------------------------------------------------------------------------


def corrupt(path, offset, mask=0x10):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def before_the_read_back(monkeypatch, damage):
    """Do something to the staged directory after everything was written and before any of it is read back."""
    written = read_back.ReadBack.wrote
    finish = read_back.ReadBack.finish

    def finished(self, *arguments):
        damage(self._directory)
        monkeypatch.setattr(read_back.ReadBack, "wrote", written)
        return finish(self, *arguments)

    monkeypatch.setattr(read_back.ReadBack, "wrote", lambda self, name, count: None)
    monkeypatch.setattr(read_back.ReadBack, "finish", finished)


@pytest.mark.parametrize("method", ["slerp", "ties"])
@pytest.mark.parametrize("past_the_cache", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_flipped_bit_of_a_tensor_is_found_and_named(root, monkeypatch, request, method, past_the_cache, place):
    if past_the_cache:
        request.getfixturevalue("direct")
    name = {"first": "model.embed_tokens.weight", "middle": "model.layers.0.mlp.up_proj.weight"}.get(
        place, "model.norm.weight"
    )

    def damage(directory):
        tensor = read_header(directory / "model.safetensors")[name]
        offset = {"first": 0, "middle": tensor.nbytes // 2 + 1, "last": tensor.nbytes - 1}[place]
        corrupt(directory / "model.safetensors", tensor.offset + offset)

    before_the_read_back(monkeypatch, damage)
    fails(root, OutputError, f"{name} reads back with check sum", method)


def test_two_elements_that_were_exchanged_are_found(root, monkeypatch):
    def damage(directory):
        path = directory / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[4096:4098], data[4098:4100] = data[4098:4100], data[4096:4098]
        path.write_bytes(data)

    before_the_read_back(monkeypatch, damage)
    fails(root, OutputError, "model.embed_tokens.weight reads back with check sum")


@pytest.mark.parametrize("cut", [1, 5000])
def test_an_output_that_lost_its_end_is_found(root, monkeypatch, cut):
    def damage(directory):
        path = directory / "model.safetensors"
        os.truncate(path, path.stat().st_size - cut)

    before_the_read_back(monkeypatch, damage)
    fails(root, Gemma2Error, "is truncated")


def test_a_header_that_was_changed_is_found(root, monkeypatch):
    def damage(directory):
        path = directory / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data.replace(b"model.norm.weight", b"model.Norm.weight"))

    before_the_read_back(monkeypatch, damage)
    fails(root, OutputError, "reads back with other tensors than were written")


def test_without_reading_back_a_flipped_bit_is_not_found(root, monkeypatch):
    """The other half of the claim: the read-back finds it."""
    before_the_read_back(monkeypatch, lambda directory: corrupt(directory / "model.safetensors", 5000))
    merge(request(root), out=root / "out", verify=False)
    assert complete(root / "out") is False, "without the read-back a manifest has no digests of weights"


# --- interrupts in every line of the code that builds and moves outputs -----------------------------------------------


class Interrupt(BaseException):
    """Represents SIGINT or SIGTERM, which cli/main.py raises as exceptions."""


BLOCKS = ("try:", "finally:", "raise")
STAGING = ("staged_output", "locked", "_hold", "_release", "publish", "exchange", "fsync_tree", "write_json")


def interrupted_at(number, run):
    """Run something with an interrupt before line `number` of the staging functions; return the lines that ran."""
    seen = []

    def trace(frame, event, argument):
        if frame.f_code.co_name not in STAGING:
            return None
        # The interpreter checks for signals at calls; a line that only opens a block calls nothing.
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() not in BLOCKS:
            seen.append((frame.f_code.co_name, frame.f_lineno))
            if len(seen) - 1 == number:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return seen


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # an interrupt that cannot occur in reality leaves a file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_an_interrupt_before_any_line_of_the_staging_leaves_the_old_state_or_the_whole_result(root, force):
    def run():
        with staging.staged_output(root / "out", force) as directory:
            (directory / "model.safetensors").write_text("new")
            manifest.write_manifest(directory, {"status": "complete"})

    if force:
        run()
    lines = interrupted_at(None, run)
    counts = {"lines": len(lines), "old": 0, "new": 0}
    for number, (function, line) in enumerate(lines):
        shutil.rmtree(root / "out")
        if force:
            (root / "out").mkdir()
            (root / "out" / "old.txt").write_text("old")
            (root / "out" / "gemma2.json").write_text('{"files": {"old.txt": {}}}')
        before = snapshot(root)
        with pytest.raises(Interrupt):
            interrupted_at(number, run)
        assert temporaries(root) == [], f"interrupted before line {line} of {function}"
        if snapshot(root) == before:
            counts["old"] += 1
            (root / "out").mkdir(exist_ok=True)
        else:
            assert complete(root / "out"), f"interrupted before line {line} of {function}"
            counts["new"] += 1
    assert counts["old"] > 20


# --- kills: a handful; `make torture` does hundreds -------------------------------------------------------------------

# A merge that stops at a chosen place and prints "here".
STOPPED = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from gemma2.cli import main
from gemma2.core.outputs import digests, hashing, manifest, staging
from gemma2.merging import engine

def stop(*arguments, **options):
    sys.stdout.write("here\\n")
    sys.stdout.flush()
    for _ in range(600):  # a signal that arrives just before a sleep does not end it
        time.sleep(0.1)

place = {"before the weights": (engine, "_groups"), "before the manifest": (engine, "write_manifest"),
         "before the rename": (staging, "publish")}[sys.argv[3]]
setattr(*place, stop)
sys.argv[1:] = sys.argv[4:]
main.main()
"""


def stopped(root, where, *more):
    """Start a merge by the command line that waits at a place; return when it has reached it."""
    folders = [str(Path(faults.__file__).parent), str(Path(faults.__file__).parents[1])]
    words = ("merge", "linear", root / "rl-1", root / "rl-2", "--out", root / "out", "--quiet", *more)
    process = start(STOPPED, *folders, where, *words)
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [
        (signal.SIGTERM, 143, "before the weights"),
        (signal.SIGINT, 130, "before the manifest"),
        (signal.SIGKILL, -9, "before the rename"),
    ],
)
def test_a_process_that_is_ended_in_the_middle(root, number, code, where):
    merge(request(root, "linear"), out=root / "out")
    before = snapshot(root)
    process = stopped(root, where, "--force")
    assert len(temporaries(root)) >= 2, "the lock and the staged directory"
    process.send_signal(number)
    ended, _, err = finish(process)
    assert ended == code
    assert "Traceback" not in err
    if number == signal.SIGKILL:
        assert {name: data for name, data in snapshot(root).items() if not name.startswith(".")} == before
        merge(request(root, "linear"), out=root / "out", force=True)
        assert complete(root / "out")
        assert weights(root / "out") == {name[4:]: data for name, data in before.items() if is_weight(name)}
        assert temporaries(root) == []
    else:
        assert snapshot(root) == before


def is_weight(name):
    """Whether a file is in the output and not its manifest, which holds the time."""
    return name.startswith("out/") and not name.endswith(manifest.MANIFEST)
