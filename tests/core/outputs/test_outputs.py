"""Outputs appear complete or not at all: refusals, one rename, one writer, nothing left behind, and the manifest."""

import errno
import fcntl
import json
import os
import stat

import pytest
from processes import finish, start

from gemma2.core.errors import InputError, OutputError
from gemma2.core.json_files import write_json
from gemma2.core.outputs import staging
from gemma2.core.outputs.manifest import read_manifest, require_complete, write_manifest
from gemma2.core.outputs.staging import check_output, check_partial, locked, staged_output


def make(out, text="result", force=False):
    with staged_output(out, force) as tmp:
        (tmp / "model.safetensors").write_text(text)
        write_manifest(tmp, {"command": "test", "status": "complete"})


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# --- where an output may go -------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_unchanged(tmp_path):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(OutputError, match="exists; choose another --out, or replace it with --force"):
        make(out, "other")
    assert (out / "model.safetensors").read_text() == "result"


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["status"] == "complete"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_link_is_refused_even_with_force(tmp_path, kind, force):
    out = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "gone"))
    with pytest.raises(OutputError, match="is not a directory"):
        make(out, force=force)
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("place", ["in", "in/deeper", ".", "other/../in", "link"])
def test_an_output_that_is_or_contains_or_is_inside_an_input_is_refused(tmp_path, place):
    source = tmp_path / "top" / "in"
    source.mkdir(parents=True)
    (tmp_path / "top" / "other").mkdir()
    (tmp_path / "top" / "link").symlink_to(source)
    with pytest.raises(OutputError, match=r"--model .* overlap"):
        check_output(tmp_path / "top" / place, force=True, inputs={"--model": source})


def test_a_sibling_whose_name_begins_like_the_input_does_not_overlap(tmp_path):
    (tmp_path / "in").mkdir()
    check_output(tmp_path / "in-2", force=False, inputs={"--model": tmp_path / "in"})


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_an_output_without_a_name_is_refused(out):
    with pytest.raises(OutputError, match="does not name a directory"):
        check_output(staging.Path(out), force=True)


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a writable directory"):
        check_output(tmp_path / "file" / "a" / "b", force=False)


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_by_a_block_that_fails(tmp_path, error):
    with pytest.raises(error), staged_output(tmp_path / "out") as tmp:
        (tmp / "half").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_output(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), staged_output(tmp_path / "out", force=True) as tmp:
        (tmp / "model.safetensors").write_text("new")
        raise RuntimeError
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_output_path_does_not_exist_before_the_output_is_complete(tmp_path):
    with staged_output(tmp_path / "out") as tmp:
        assert not (tmp_path / "out").exists()
        assert tmp.parent == tmp_path
        assert tmp.name.startswith(".")
        (tmp / "file").write_text("x")
    assert names(tmp_path) == ["out"]


def test_force_replaces_everything_in_one_exchange(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make(out, "old")
    (out / "stale.txt").write_text("of the old output")
    seen = []

    def spy(new, old):
        seen.append((old / "model.safetensors").read_text())
        swapped = exchange(new, old)
        seen.append((old / "model.safetensors").read_text())
        return swapped

    exchange = staging.exchange
    monkeypatch.setattr(staging, "exchange", spy)
    make(out, "new", force=True)
    assert seen == ["old", "new"]
    assert names(out) == ["gemma2.json", "model.safetensors"]
    assert names(tmp_path) == ["out", "out.kept"]


def test_force_works_where_the_system_cannot_exchange(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    monkeypatch.setattr(staging, "exchange", lambda new, old: False)
    make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="appeared while the command ran"), staged_output(tmp_path / "out") as tmp:
        (tmp / "mine").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("y")
    assert names(tmp_path / "out") == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_leftovers_of_a_killed_process_are_removed_and_other_files_are_kept(tmp_path):
    for name in (".a[1].tmp-99-abc", ".a[1]b.tmp-99-abc", ".a1.tmp-99-abc"):
        (tmp_path / name).mkdir()
    make(tmp_path / "a[1]")
    assert names(tmp_path) == [".a1.tmp-99-abc", ".a[1]b.tmp-99-abc", "a[1]"]


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.add(os.fstat(fd).st_ino), fsync(fd)))
    make(tmp_path / "out")
    for path in [tmp_path, tmp_path / "out", *(tmp_path / "out").iterdir()]:
        assert path.stat().st_ino in flushed, path


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        make(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_a_full_disk_while_writing_json_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


# --- one writer -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from gemma2.core.outputs.staging import staged_output
with staged_output(Path(sys.argv[1])) as tmp:
    (tmp / "file").write_text("first")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_fails_clearly_and_the_first_one_finishes(tmp_path):
    first = start(HOLD, tmp_path / "out", stdin=-1)
    assert first.stdout.readline() == "ready\n"
    with pytest.raises(OutputError, match=r"another gemma2 process is writing .*out"):
        make(tmp_path / "out")
    code, _, err = finish(first)
    assert code == 0, err
    assert names(tmp_path / "out") == ["file"]
    assert names(tmp_path) == ["out"]


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path):
    first = start(HOLD, tmp_path / "out", stdin=-1)
    assert first.stdout.readline() == "ready\n"
    first.kill()
    finish(first)
    assert len(names(tmp_path)) == 2, "the lock file and the half-made directory"
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("planted", ["a link", "a dangling link", "a pipe", "a folder", "data"])
def test_a_planted_lock_is_neither_followed_nor_waited_for_nor_removed(tmp_path, planted):
    lock, elsewhere = tmp_path / ".out.lock", tmp_path / "elsewhere"
    if planted == "a link":
        elsewhere.write_text("precious")
    made = {"a pipe": lambda: os.mkfifo(lock), "a folder": lock.mkdir, "data": lambda: lock.write_text("precious")}
    made.get(planted, lambda: lock.symlink_to(elsewhere))()
    with pytest.raises(OutputError, match=r"\.out\.lock is not a lock of ours.*remove it"), locked(tmp_path / "out"):
        raise AssertionError
    assert lock.is_symlink() or lock.exists()
    assert elsewhere.exists() == (planted == "a link")


@pytest.mark.parametrize("planted", ["lock", "partial"])
def test_what_another_user_planted_is_refused_and_left(planted, tmp_path, monkeypatch):
    path = tmp_path / f".out.{planted}"
    path.mkdir() if planted == "partial" else path.touch()
    if os.geteuid() == 0:
        os.chown(path, 4711, 4711)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(OutputError, match=rf"\.out\.{planted} is not a .* of ours.*remove it"):
        if planted == "partial":
            check_partial(path)
        with locked(tmp_path / "out"):
            raise AssertionError
    assert path.exists()


def test_a_folder_that_looks_left_over_is_swept_only_if_it_is_ours(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "precious").mkdir(parents=True)
    (tmp_path / ".out.tmp-1-abc").symlink_to(elsewhere)
    make(tmp_path / "out")
    assert (elsewhere / "precious").is_dir() and (tmp_path / ".out.tmp-1-abc").is_symlink()


def test_a_lock_is_free_after_an_exception(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "out"):
        raise RuntimeError
    with locked(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock"]
    assert names(tmp_path) == []


# --- manifest ---------------------------------------------------------------------------------------------------------


def test_the_manifest_has_size_and_digest_of_every_file_of_the_output(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("abc")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "big").write_text("x")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "gemma2.json").write_text("{}")
    (tmp_path / "inner" / "weights").write_text("an output by itself")
    written = write_manifest(tmp_path, {"command": "test", "status": "complete"})
    assert written == read_manifest(tmp_path)
    digest = "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert written["files"] == {"sub/a.txt": {"size": 3, "digest": digest}}
    assert written["schema_version"] == 2
    assert written["gemma2"]


@pytest.mark.parametrize("text", ["{", "[]", '{"files": []}', "\udcff"])
def test_a_broken_manifest_is_named(tmp_path, text):
    (tmp_path / "gemma2.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"gemma2\.json"):
        read_manifest(tmp_path)


def test_a_directory_without_a_manifest_is_accepted_as_a_foreign_model(tmp_path):
    assert read_manifest(tmp_path) is None
    require_complete(tmp_path, "--model")


@pytest.mark.parametrize("status", ["running", None])
def test_an_unfinished_directory_is_refused_as_an_input(tmp_path, status):
    write_json(tmp_path / "gemma2.json", {"status": status})
    with pytest.raises(InputError, match=r"--model .* is an unfinished output"):
        require_complete(tmp_path, "--model")


def test_a_look_at_the_lock_does_not_stop_who_comes_to_write(tmp_path, monkeypatch):
    path = tmp_path / ".out.lock"
    looking = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        fcntl.flock(looking, fcntl.LOCK_UN)

    monkeypatch.setattr("gemma2.core.outputs.staging.time.sleep", pause)
    with locked(tmp_path / "out"):
        assert pauses
    os.close(looking)
