"""What killed processes and failing disks leave next to and in outputs, and folders that are moved away."""

import errno
import os

import pytest

from gemma2.core.errors import InputError, OutputError, refusal
from gemma2.core.outputs.manifest import remove_temporaries, write_manifest
from gemma2.core.outputs.staging import locked
from gemma2.core.outputs.text_file import write_text

DEAD = 2**22 + 1  # above the largest number of a process


@pytest.mark.parametrize("name", ["report.html", "a[b]*.html"])
def test_a_text_file_removes_what_killed_writers_of_it_have_left(tmp_path, name):
    ours = tmp_path / f".{name}.tmp-{DEAD}"
    others = [tmp_path / f".{name}.tmp-{os.getppid()}", tmp_path / f".{name}.tmp-x", tmp_path / ".other.html.tmp-1"]
    for path in (ours, *others):
        path.write_text("half")
    write_text(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"
    assert not ours.exists()
    assert all(path.exists() for path in others)


def test_an_output_is_published_without_the_files_that_were_not_renamed_yet(tmp_path):
    inner = tmp_path / "ema"
    separate = tmp_path / "stage"
    for folder in (tmp_path, inner, separate, tmp_path / "checkpoints"):
        folder.mkdir(exist_ok=True)
        for name in (".run.json.tmp", ".report.html.tmp-123", ".tmpAb12cD", "model.safetensors", ".hidden", "a.tmp"):
            (folder / name).write_text("x")
    write_manifest(separate, {"status": "complete"})
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    remove_temporaries(tmp_path)
    gone = before - {path for path in tmp_path.rglob("*") if path.is_file()}
    names = (".run.json.tmp", ".report.html.tmp-123", ".tmpAb12cD")
    assert gone == {folder / name for folder in (tmp_path, inner) for name in names}


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "w"), RuntimeError("Parent directory")])
def test_a_folder_that_is_moved_away_is_named_in_place_of_what_fails_then(tmp_path, error):
    (tmp_path / "runs").mkdir()
    moved = r"was moved or removed while the command ran .*; put it back"
    with pytest.raises(OutputError, match=moved), locked(tmp_path / "runs" / "out"):
        (tmp_path / "runs").rename(tmp_path / "moved")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "w"), RuntimeError(), InputError("bad", "fix")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, locked(tmp_path / "out"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EINTR])
def test_a_failing_disk_is_one_line(number):
    line = refusal(OSError(number, os.strerror(number), "weights"))
    assert line == f"{os.strerror(number)}: weights; see whether the disk works, and start the command again"
    in_rust = refusal(RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})"))
    assert in_rust is not None and in_rust.endswith("start the command again")
