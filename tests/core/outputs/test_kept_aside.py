"""`--force` replaces outputs of gemma2 only, and no file in them that is not ours."""

import errno
import os
import signal
from pathlib import Path

import pytest

from gemma2.core.errors import InputError, OutputError
from gemma2.core.outputs import staging
from gemma2.core.outputs.manifest import write_manifest
from gemma2.core.outputs.staging import staged_output, take_notes


@pytest.fixture(autouse=True)
def _no_notes():
    take_notes()


def make(out, text="result", force=False):
    with staged_output(out, force) as tmp:
        (tmp / "model.safetensors").write_text(text)
        write_manifest(tmp, {"command": "test", "status": "complete"})


def files(root):
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", "deep/er/notes.txt", "run.json", "checkpoints/mine"])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, name, force):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"holds something else .*gemma2\.json; choose another --out"):
        make(tmp_path / "out", force=force)
    assert files(tmp_path) == {f"out/{name}": "precious"}


def test_a_folder_that_appears_while_the_command_runs_is_not_replaced(tmp_path):
    with pytest.raises(OutputError, match="holds something else"), staged_output(tmp_path / "out", True) as tmp:
        write_manifest(tmp, {"status": "complete"})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("precious")
    assert files(tmp_path) == {"out/notes.txt": "precious"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_files_that_no_manifest_lists_are_kept_aside_and_named(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(staging, "exchange", lambda new, old: False)
    out = tmp_path / "out"
    make(out, "old")
    make(out / "stage", "old stage")
    mine = {"notes.txt": "precious", ".git/HEAD": "ref", "stage/more.txt": "too"}
    for name, text in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    (out / "link").symlink_to(tmp_path)
    make(out, "new", force=True)
    assert {name: text for name, text in files(tmp_path / "out.kept").items() if "link" not in name} == mine
    assert os.readlink(tmp_path / "out.kept" / "link") == str(tmp_path)
    assert files(out).keys() == {"gemma2.json", "model.safetensors"}
    assert take_notes() == [
        f"{out} held files of others, which are now in {out}.kept: .git/HEAD, link, notes.txt, stage/more.txt"
    ]
    (out / "again.txt").write_text("again")
    make(out, "newer", force=True)
    assert files(tmp_path / "out.kept-2") == {"again.txt": "again"}


def test_an_output_without_files_of_others_is_replaced_silently(tmp_path):
    make(tmp_path / "out", "old")
    make(tmp_path / "out", "new", force=True)
    assert take_notes() == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", ["keep_aside", "exchange", "shutil.rmtree"])
def test_a_kill_while_an_output_is_replaced_keeps_files_of_others(tmp_path, monkeypatch, call):
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "notes.txt").write_text("precious")
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(
                f"gemma2.core.outputs.staging.{call}", lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
            )
            make(tmp_path / "out", "new", force=True)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    make(tmp_path / "out", "new", force=True)
    found = files(tmp_path)
    assert found["out/model.safetensors"] == "new"
    assert [text for name, text in found.items() if name.endswith("notes.txt")] == ["precious"]


@pytest.mark.parametrize("target", ["elsewhere", "gone"])
@pytest.mark.parametrize("force", [False, True])
def test_a_symbolic_link_is_refused_and_its_target_stays(tmp_path, target, force):
    make(tmp_path / "elsewhere", "theirs")
    before = files(tmp_path)
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(OutputError, match=rf"is not a directory but a symbolic link to {target}; remove the link"):
        make(tmp_path / "out", force=force)
    (tmp_path / "out").unlink()
    assert files(tmp_path) == before


@pytest.mark.parametrize("out", ["/proc/x", "/proc/1/x", "/proc/x/y", "/sys/x"])
def test_a_place_where_nothing_can_be_created_is_an_error_in_one_line(out):
    with pytest.raises(OutputError, match=r"cannot write --out \S+ .*; choose another --out"):
        make(Path(out))


def test_a_manifest_that_the_disk_does_not_give_moves_nothing(tmp_path, monkeypatch):
    """Else every file of the old output would count as one of others, and leave it."""
    make(tmp_path / "out", "old")
    before = files(tmp_path)

    def failing(directory):
        raise InputError(f"{directory}/gemma2.json cannot be read", "") from OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot be read"):
        patch.setattr(staging, "read_manifest", failing)
        make(tmp_path / "out", "new", force=True)
    assert files(tmp_path) == before
