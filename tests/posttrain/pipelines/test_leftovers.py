"""What a kill leaves in and next to a complete stage, between its rename and its end: the next run removes it."""

import pytest
from stages import MAKE, compiled, run

from gemma2.core.outputs.manifest import CHECKPOINTS, STATE, read_manifest
from gemma2.core.outputs.model_identity import identity_of
from gemma2.core.outputs.staging import locked
from gemma2.posttrain.runs import commands
from gemma2.posttrain.runs.commands import output_hash
from gemma2.posttrain.runs.finished import publish_finished
from gemma2.posttrain.runs.run_directory import RunOptions

STAGES = {
    "a": {"command": "make", "options": {"value": 1}},
    "b": {"command": "make", "options": {"model": "${a.out}", "value": 2}},
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setitem(commands.COMMANDS, "make", MAKE)
    run(compiled(STAGES, tmp_path / "p"))
    return tmp_path / "p"


def leave(out):
    """What a kill right after the rename leaves, also where an output was replaced."""
    (out / STATE).write_text("{}")
    (out / CHECKPOINTS / "checkpoint-1").mkdir(parents=True)
    out.with_name(f".{out.name}.lock").touch()
    for name in ("partial", "tmp-7-abc"):
        out.with_name(f".{out.name}.{name}").mkdir()


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.name != "pipeline.json"}


@pytest.mark.parametrize("done", [True, False])
def test_a_pipeline_removes_what_was_left_of_a_complete_stage(root, done):
    before = files(root)
    leave(root / "a")
    if not done:
        (root / "b" / "gemma2.json").unlink()
        for path in (root / "b").iterdir():
            path.unlink()
        (root / "b").rmdir()
    run(compiled(STAGES, root))
    assert files(root) == before


def test_what_was_left_is_no_part_of_a_model(root):
    """A stage that ran before it was removed has the same parents as one that ran after it."""
    identity, made = identity_of(root / "a"), output_hash(read_manifest(root / "b"))
    leave(root / "a")
    assert identity_of(root / "a") == identity
    run(compiled(STAGES, root), force=frozenset({"b"}))
    assert output_hash(read_manifest(root / "b")) == made


def test_an_interrupted_run_next_to_a_complete_output_stays(root):
    (root / ".a.partial").mkdir()
    (root / ".a.partial" / STATE).write_text("{}")
    run(compiled(STAGES, root))
    assert (root / ".a.partial" / STATE).exists()


def test_nothing_is_removed_while_another_process_writes(root):
    (root / "a" / STATE).write_text("{}")
    with locked(root / "a"):
        run(compiled(STAGES, root))
    assert (root / "a" / STATE).exists()


def test_a_start_that_is_refused_removes_a_lock_that_nobody_holds(root):
    (root / ".a.lock").touch()
    assert publish_finished(MAKE.schema(value=1), RunOptions(root / "a")) is None
    assert not (root / ".a.lock").exists() and (root / "a" / "gemma2.json").exists()
