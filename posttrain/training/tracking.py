"""Metrics to TensorBoard, W&B and trackio, in addition to metrics.jsonl, which remains the record of a run.

A tracker gets the figures of metrics.jsonl, under the same names, from `Run.log`. transformers' own callbacks are not
used: they log every argument of the trainer, record the name of the machine, write TensorBoard's files to the directory
where checkpoints are removed, and after a resume send the repeated steps a second time. Here

    tensorboard     is rewritten from metrics.jsonl at each start, into the output, as one file
    wandb, trackio  continue the run that they began, without the steps that they already have

W&B and trackio are configured by their own environment variables (WANDB_PROJECT, WANDB_MODE, TRACKIO_SPACE_ID, ...);
the default project is `gemma2`, the name of a run is that of its output directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from gemma2.core.errors import UsageError
from gemma2.core.interrupts import allow
from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.posttrain.runs.run_directory import Run

__all__ = ["check_tracking", "tracked"]

FOLDER = "tensorboard"
CURSOR = "tracked.json"
PROJECT = "gemma2"
UPLOAD = 60.0  # seconds that an interrupted run gives a service to take what was sent


class Tracker(Protocol):
    """Receives the figures of every step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Send(Protocol):
    """The `log` of W&B and trackio."""

    def __call__(self, metrics: dict[str, float], *, step: int) -> object: ...


def check_tracking(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"--report-to {name} needs the package {name}", f"pip install {name}")


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Send the figures that `run` logs to the trackers of its configuration while the block runs."""
    names = run.origin["config"].get("report_to", ()) if run.ranks.is_main else ()
    with ExitStack() as stack:
        for name in names:
            tracker = OPEN[name](run)
            stack.callback(tracker.close)
            listener = _figures(tracker)
            run.listeners.append(listener)
            stack.callback(run.listeners.remove, listener)
        yield


def _figures(tracker: Tracker) -> Callable[[int, JsonMapping], None]:
    """Return a listener that passes on the numbers of a step."""

    def listener(step: int, metrics: JsonMapping) -> None:
        tracker.log(step, {key: value for key, value in metrics.items() if isinstance(value, int | float)})

    return listener


class TensorBoard:
    """Events in the folder `tensorboard` of the output."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run.path / FOLDER
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = SummaryWriter(log_dir=str(self.folder))
        for row in _logged(run.path / "metrics.jsonl"):
            _figures(self)(row.pop("step"), row)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
        for file in self.folder.glob("events.out.tfevents.*"):  # the writer's name includes that of the machine
            file.rename(self.folder / f"events.out.tfevents.{int(time.time())}.gemma2")


class Remote:
    """A service that stores the figures: steps that it already has are not sent again."""

    def __init__(self, run: Run, send: Send, finish: Callable[[], object]) -> None:
        self.cursor = run.checkpoints / CURSOR
        self.send = send
        self.finish = finish
        self.sent = int(load_json(self.cursor)) if self.cursor.exists() else -1
        self.cursor.parent.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self.sent:
            self.send(dict(metrics), step=step)
            self.cursor.write_text(json.dumps(step))

    def close(self) -> None:
        allow(UPLOAD)
        with redirect_stdout(sys.stderr):
            self.finish()


def open_wandb(run: Run) -> Tracker:
    """Open a run of W&B with an id derived from the output and the time of its start, so that a resume finds it."""
    wandb = import_module("wandb")
    begun = f"{run.options.out.resolve()} {run.origin['started']}"
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.options.out.name,
        id=hashlib.sha256(begun.encode()).hexdigest()[:16],
        resume="allow",
        config=run.origin["config"],
    )
    return Remote(run, opened.log, opened.finish)


def open_trackio(run: Run) -> Tracker:
    """Open a run of trackio; a resume continues it by its name."""
    trackio = import_module("trackio")
    with redirect_stdout(sys.stderr):
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.options.out.name,
            config=run.origin["config"],
            resume="allow" if run.resumed else "never",
        )
    return Remote(run, trackio.log, trackio.finish)


OPEN: Mapping[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": open_wandb,
    "trackio": open_trackio,
}


def _logged(path: Path) -> list[JsonObject]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
