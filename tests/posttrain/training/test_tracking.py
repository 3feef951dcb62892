"""Trackers: what metrics.jsonl holds, once, also after a resume; no name of a machine in the output."""

from __future__ import annotations

import json
import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest

from gemma2.core.errors import UsageError
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
from gemma2.posttrain.schemas import TrainingFields
from gemma2.posttrain.training import tracking
from gemma2.posttrain.training.tracking import check_tracking, tracked


class Writer:
    """SummaryWriter, as far as it is used."""

    def __init__(self, log_dir):
        from pathlib import Path

        Path(log_dir).mkdir(parents=True)
        self.file = Path(log_dir) / f"events.out.tfevents.1.{socket.gethostname()}.2.0"
        self.file.write_text("")

    def add_scalar(self, name, value, step):
        with self.file.open("a") as file:
            file.write(json.dumps([name, value, step]) + "\n")

    def flush(self):
        pass

    def close(self):
        pass


class Service(ModuleType):
    """wandb and trackio: what they were sent."""

    def __init__(self, name):
        super().__init__(name)
        self.sent, self.opened, self.finished = [], [], 0

    def init(self, **settings):
        self.opened.append(settings)
        sys.stdout.write("a banner\n")
        return self

    def log(self, metrics, step):
        self.sent.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def services(monkeypatch):
    found = SimpleNamespace(wandb=Service("wandb"), trackio=Service("trackio"))
    monkeypatch.setitem(sys.modules, "wandb", found.wandb)
    monkeypatch.setitem(sys.modules, "trackio", found.trackio)
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return found


def session(out, first, last, *, resume=False, report_to=("tensorboard", "wandb", "trackio"), stop=True):
    """Steps `first` to `last` of a run; `stop` leaves it interrupted with a checkpoint at step 2."""
    config = TrainingFields(report_to=report_to)
    with open_run("sft", config, RunOptions(out, resume=resume)) as run:
        (run.checkpoints / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        run.rewind(first - 1)
        with tracked(run):
            for step in range(first, last + 1):
                run.log(step, loss=1.0 / step, note="no figure")
            if stop:
                raise KeyboardInterrupt
        run.finish({})


def test_every_tracker_gets_the_figures_of_metrics_jsonl_once(tmp_path, services, capsys):
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path / "out", 1, 3)
    session(tmp_path / "out", 3, 5, resume=True, stop=False)
    expected = [(step, {"loss": 1.0 / step}) for step in range(1, 6)]
    assert services.wandb.sent == services.trackio.sent == expected
    (events,) = (tmp_path / "out" / "tensorboard").iterdir()
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert lines == [["loss", 1.0 / step, step] for step in range(1, 6)]
    assert services.wandb.finished == services.trackio.finished == 2
    assert capsys.readouterr().out == "a banner\n" * 2, "of wandb alone, which writes to stderr by itself"


def test_a_resumed_run_is_the_same_run_of_the_service(tmp_path, services):
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path / "out", 1, 2)
    session(tmp_path / "out", 3, 3, resume=True, stop=False)
    session(tmp_path / "other", 1, 1, stop=False)
    first, second, other = (opened["id"] for opened in services.wandb.opened)
    assert first == second != other
    assert services.wandb.opened[0]["project"] == "gemma2" and services.wandb.opened[0]["name"] == "out"
    assert [opened["resume"] for opened in services.trackio.opened] == ["never", "allow", "never"]


def test_the_output_does_not_name_the_machine(tmp_path, services):
    session(tmp_path / "out", 1, 1, report_to=("tensorboard",), stop=False)
    assert not any(socket.gethostname() in path.name for path in (tmp_path / "out").rglob("*"))


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--report-to wandb needs the package wandb; pip install wandb"):
        check_tracking(["wandb"])
