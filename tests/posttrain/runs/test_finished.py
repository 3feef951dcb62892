"""A run that is killed between its last step and its end: at every call that changes a file."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from text_model import text_of, write_text_model

from gemma2.core.errors import Gemma2Error, OutputError
from gemma2.core.outputs.manifest import CHECKPOINTS, STATE, read_manifest
from gemma2.core.ranks import Ranks
from gemma2.posttrain.runs import commands, finished
from gemma2.posttrain.runs.finished import publish_finished
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
from gemma2.posttrain.schemas import DistillConfig, ProbeConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
MOST = 60  # more calls than a run's end has


class Settings(Config):
    data: Path
    steps: int = 4


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(commands.COMMANDS, "sft", replace(commands.COMMANDS["sft"], schema=Settings))
    (tmp_path / "data.jsonl").write_text('{"prompt": "hi"}\n')
    return tmp_path


def settings(place, **other):
    return Settings(**({"data": place / "data.jsonl"} | other))


def train(place, options, armed=lambda: None):
    """What a command does: it publishes what is complete, or trains, with checkpoints if it begins."""
    config = settings(place)
    finished = publish_finished(config, options)
    if finished is not None:
        return finished
    with open_run("sft", config, options) as run:
        (run.checkpoints / "checkpoint-4").mkdir(parents=True, exist_ok=True)
        (run.checkpoints / "checkpoint-4" / "optimizer.pt").write_text("state")
        armed()
        write_text_model(run.path, "result")
        return run.finish({"loss": 0.5})


def killed_at(place, options, number):
    """Train in a child process that SIGKILL ends before its call `number` that changes a file. True if it got there."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def hook(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in CHANGES:
                calls[0] += 1
                if calls[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            train(place, options, lambda: sys.addaudithook(hook))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def next_start(place, force):
    """The same command again, without --resume, or with it where the command says so."""
    try:
        return train(place, RunOptions(place / "out", force=force))
    except Gemma2Error as error:
        if "is complete" in str(error) or "exists; choose another --out" in str(error):
            return None
        return train(place, RunOptions(place / "out", resume=True, force=force))


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_at_every_call_of_the_end_of_a_run_loses_nothing(place, force):
    for number in range(1, MOST):
        base = place / f"trial-{number}"
        base.mkdir()
        (base / "data.jsonl").write_text('{"prompt": "hi"}\n')
        if force:
            old = open_run("sft", Settings(data=base / "data.jsonl", steps=1), RunOptions(base / "out"))
            with old as run:
                write_text_model(run.path, "old")
                run.finish({})
        reached = killed_at(base, RunOptions(base / "out", force=force), number)
        complete = [
            path
            for path in (base / "out", base / ".out.partial")
            if (path / STATE).exists() and (read_manifest(path) or {}).get("status") == "complete"
        ]
        result = next_start(base, force) if reached else None
        assert text_of(base / "out") == "result", number
        assert not (base / "out" / CHECKPOINTS).exists(), number
        assert not (base / "out" / STATE).exists(), number
        left = {path.name for path in base.iterdir()} - {"data.jsonl", "out"}
        assert left <= (set() if result else {".out.lock"}), number
        assert not complete or result is not None, number
        if not reached:
            break
    else:
        pytest.fail(f"more than {MOST} calls")
    assert number > 6


def finished_and_killed(place, monkeypatch):
    """A complete run in its partial folder."""
    from gemma2.posttrain.runs import run_directory

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(place, RunOptions(place / "out"))


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}, {"resume": True, "force": True}])
def test_every_start_publishes_a_complete_run(place, monkeypatch, options):
    finished_and_killed(place, monkeypatch)
    result = publish_finished(settings(place), RunOptions(place / "out", **options))
    assert result is not None
    assert result.summary == {"loss": 0.5}
    assert text_of(place / "out") == "result"
    assert sorted(path.name for path in place.iterdir()) == ["data.jsonl", "out"]


def test_a_complete_run_of_other_settings_or_with_other_bytes_is_not_published(place, monkeypatch):
    finished_and_killed(place, monkeypatch)
    options = RunOptions(place / "out", resume=True)
    assert publish_finished(settings(place, steps=5), options) is None
    write_text_model(place / ".out.partial", "torn")
    assert publish_finished(settings(place), options) is None
    assert (place / ".out.partial" / CHECKPOINTS / "checkpoint-4").is_dir()
    assert not (place / "out").exists()


@pytest.mark.parametrize("planted", ["a link", "another user"])
def test_a_complete_run_that_is_not_ours_is_not_published(place, monkeypatch, planted):
    finished_and_killed(place, monkeypatch)
    partial = place / ".out.partial"
    if planted == "a link":
        partial.rename(place / "elsewhere")
        partial.symlink_to(place / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(partial, 4711, 4711)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    for start in (publish_finished, lambda config, options: train(place, options)):
        with pytest.raises(OutputError, match=r"\.out\.partial is not a run of ours.*remove it"):
            start(settings(place), RunOptions(place / "out", resume=True))
    assert partial.exists() and not (place / "out").exists()


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (SftConfig(model="m", data=("d",)), "sft"),
        (RewardConfig(model="m", data="d"), "reward"),
        (DistillConfig(model="m", teacher="t", prompts="p"), "distill"),
        (RlhfConfig(policy="m", prompts="p"), "rlhf"),
        (ProbeConfig(model="m", data="d"), None),
    ],
)
def test_rank_0_of_every_training_in_several_processes_looks_and_publishes(tmp_path, monkeypatch, config, command):
    met = []

    class Pair(Ranks):
        def on_main(self, work):
            return "published" if self.rank == 0 else "heard"

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(finished, "join", lambda name: met.append(name) or Pair(0, 2))
    assert publish_finished(config, RunOptions(tmp_path / "out")) == ("published" if command else None)
    assert met == ([command] if command else [])  # a command in one process is refused later: nobody is met


def test_the_token_of_a_killed_start_is_removed_next_to_a_complete_output_and_by_the_next_run(place):
    token = place / ".out.token-0123456789abcdef"
    token.touch()
    train(place, RunOptions(place / "out"))
    assert not token.exists()
    token.touch()
    finished.tidy(place / "out")
    assert not token.exists()
    assert read_manifest(place / "out")["status"] == "complete"
