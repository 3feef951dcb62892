"""The short form of tests/torture/test_calls.py: one command, struck at some of its calls that change a file."""

import errno
import shutil
from pathlib import Path

import pytest
from blows import MODES, Place, chosen
from world import World
from zygote import has_compiler, zygote

from gemma2.core.errors import OutputError
from gemma2.core.outputs.manifest import CHECKPOINTS, STATE
from gemma2.core.outputs.staging import take_notes
from gemma2.posttrain.data.files.shards import ShardWriter
from gemma2.posttrain.pipelines.run import check_place
from gemma2.posttrain.runs.run_directory import remove_resume_state

STRIKES = {"kill": 0.2, "full": 0.4, "eio": 0.5, "interrupted": 0.4, "read-only": 0.5, "vanished": 0.8}


@pytest.mark.skipif(not has_compiler(), reason="needs Linux and a C compiler")
def test_a_call_that_fails_is_one_line_and_the_next_start_ends_with_the_right_bytes(tmp_path):
    world = World(tmp_path, models=False)
    with zygote(calls=True, commands=["filter"]) as parent:
        place = Place(parent, world, "filter")
        code, err, calls = place.afresh().run()
        assert code == 0, err
        expected = world.expected(parent, "filter")
        faults = [
            f"{word} at {call.number} {call.name} {call.path}: {fault}"
            for word, share in STRIKES.items()
            for call in chosen(calls, MODES[word], share)
            if (fault := place.afresh().blow(call, MODES[word], [expected]))
        ]
    assert faults == []


@pytest.mark.parametrize("stuck", [CHECKPOINTS, STATE])
def test_a_complete_output_whose_state_cannot_be_removed_is_complete(tmp_path, monkeypatch, stuck):
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / STATE).touch()

    def refused(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(*((shutil, "rmtree") if stuck == CHECKPOINTS else (Path, "unlink")), refused)
        remove_resume_state(tmp_path)
    [note] = take_notes()
    assert "is complete, but" in note and "(Input/output error)" in note
    assert (tmp_path / STATE).exists()  # so that the next start finds the rest
    remove_resume_state(tmp_path)
    assert [*tmp_path.iterdir()] == [] == take_notes()


def test_rows_that_cannot_be_written_are_the_error_and_leave_nothing(tmp_path, monkeypatch):
    opened = Path.open

    def full(self, *words, **options):
        if self.name == ".data-00001.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *words, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path, 1) as shards:
        shards.write({"a": 1})
        shards.write({"a": 2})
    assert [*tmp_path.iterdir()] == []


def test_a_pipeline_starts_where_a_kill_left_its_own_temporary_and_nothing_else(tmp_path):
    (tmp_path / ".pipeline.yaml.tmp").touch()
    check_place(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".pipeline.yaml.tmp").unlink()
    with pytest.raises(OutputError, match="holds something else"):
        check_place(tmp_path)
