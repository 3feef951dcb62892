"""Follows an output: one `look` reads what is new in its files and returns a view. Nothing is written, except an alert.

A run is asked to end by a file (`runs/live.py`), which it reads before its next optimizer step; so a watcher needs no
process id, and may run on another machine that shares the disk.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import OutputError
from gemma2.core.json_files import JsonMapping
from gemma2.core.outputs.manifest import MANIFEST, STATE
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.pipelines.state import STATE_FILE
from gemma2.posttrain.runs.live import ask_to_end

from .alerts import Alert, check_metrics, holding
from .metric_names import is_expected
from .pace import Pace, pace_of, seconds_between, seconds_since
from .run_watch import RunWatch
from .view import DONE, Details, StageView, View
from .watched_output import WatchedOutput, find_output, read_object

__all__ = ["Following"]

OPEN = ("running", "failed", "interrupted")
MOST_DETAILS = 8  # runs whose figures are shown at once
PATIENCE = 2  # looks without a process until an output that says `running` counts as ended


@dataclass
class Following:
    """The state of a watcher between two looks."""

    out: Path
    alerts: Sequence[Alert] = ()
    said: dict[str, str] = field(default_factory=dict)  # stage -> what an alert said
    runs: dict[str, RunWatch] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)  # the page asks from other threads
    _state: JsonMapping = field(default_factory=dict)
    _state_seen: tuple[Path, int, int] | None = None
    _places: dict[str, Path] = field(default_factory=dict)
    _followed: Sequence[str] = ()
    _quiet: int = PATIENCE - 1  # looks in a row at which no process held the output
    _last: View | None = None

    def look(self, now: float) -> View | None:
        """Return the view of this moment; None while nothing exists. now: seconds since 1970.

        Raises InputError if the output is something else, UsageError for an alert about an unknown metric, OutputError
        if a run cannot be asked to end.
        """
        with self.lock:
            found = find_output(self.out)
            if found is None:
                return self._vanished()
            self._quiet = 0 if found.running or found.complete else self._quiet + 1
            view = self._pipeline(found, now) if found.pipeline else self._run(found, now)
            self._last = view
            return view

    def details(self, name: str) -> Details | None:
        """Return the figures of a stage, whether it runs or not; None if it has none."""
        with self.lock:
            if name not in self._places:
                return None
            run = self.runs.get(name)
            if run is None:
                run = self.runs[name] = RunWatch(self._places[name])
            if name not in self._followed:  # else its lines are for the alerts
                run.update()
            return _details_of(name, run)

    def check_at_the_end(self) -> None:
        """Raise UsageError for an alert about a metric that no run had, as far as that can be known."""
        self._check(expected=True)

    def has_kept(self, name: str) -> bool:
        """Whether a run that has ended has left something to go on from; one without a checkpoint leaves nothing."""
        return (self._places[name] / STATE).is_file()

    # --- a pipeline ---------------------------------------------------------------------------------------------------

    def _pipeline(self, found: WatchedOutput, now: float) -> View:
        state = self._read_state(found.folder / STATE_FILE)
        stored = state.get("stages", {}).items()
        records = {name: one for name, one in stored if isinstance(one, dict) and _is_inside(name)}
        alive = found.running or (not found.complete and self._quiet < PATIENCE and state.get("status") == "running")
        statuses = {name: _status(one, alive) for name, one in records.items()}
        self._places = {name: _place(found.folder, name, status) for name, status in statuses.items()}
        opened = [name for name, status in statuses.items() if status in OPEN][-MOST_DETAILS:]
        self._followed = self._with_figures(opened, statuses, records)
        for name in self._followed:
            self._follow(name, statuses[name])
        stages = [self._stage(name, records[name], statuses[name], now) for name in records]
        running = [stage for stage in stages if stage.status == "running"]
        left = [stage for stage in stages if stage.status not in DONE]
        etas = [stage.pace.eta for stage in running]
        known = bool(etas) and len(left) == len(running) and None not in etas
        status = "running" if alive else str(state.get("status") or "unknown")
        return View(
            out=str(found.out),
            pipeline=True,
            status="interrupted" if status == "running" and not alive else status,
            over=not alive,
            elapsed=_whole_time(records, alive, now),
            eta=max(eta for eta in etas if eta is not None) if known else None,
            stages=stages,
            details=[_details_of(name, self.runs[name]) for name in self._followed],
            alerts=dict(self.said),
        )

    def _with_figures(
        self, opened: Sequence[str], statuses: Mapping[str, str], records: Mapping[str, JsonMapping]
    ) -> list[str]:
        """The stages whose figures are shown: the open ones, else the last complete one with a metrics.jsonl."""
        if opened:
            return list(opened)
        complete = sorted(
            (name for name, status in statuses.items() if status == "complete"),
            key=lambda name: str(records[name].get("ended") or ""),
            reverse=True,
        )
        return [name for name in complete if (self._places[name] / "metrics.jsonl").is_file()][:1]

    def _read_state(self, path: Path) -> JsonMapping:
        """pipeline.json, which is replaced in one rename; read only when it is another file."""
        try:
            status = path.stat()
        except OSError:
            return self._state
        seen = path, status.st_ino, status.st_mtime_ns
        if seen != self._state_seen:
            found = read_object(path)
            if isinstance(found.get("stages"), dict):
                self._state, self._state_seen = found, seen
        return self._state

    def _stage(self, name: str, record: JsonMapping, status: str, now: float) -> StageView:
        run = self.runs.get(name)
        running = status == "running"
        elapsed = seconds_since(record.get("started"), now) if running else record.get("seconds")
        return StageView(
            name=name,
            command=str(record.get("command") or ""),
            status=status,
            elapsed=elapsed if isinstance(elapsed, int | float) and math.isfinite(elapsed) else None,
            pace=_pace(run, status, now) if run is not None else Pace(),
            error=str(record.get("error") or "") if status == "failed" else "",
        )

    # --- one run ------------------------------------------------------------------------------------------------------

    def _run(self, found: WatchedOutput, now: float) -> View:
        alive = found.running or (not found.complete and self._quiet < PATIENCE)
        status = "complete" if found.complete else "running" if alive else "interrupted"
        name = found.out.name
        self._places, self._followed = {name: found.folder}, [name]
        self._follow(name, status)
        run = self.runs[name]
        record = read_object(found.folder / (MANIFEST if found.complete else STATE))
        began = run.live.get("began")
        if found.complete:
            elapsed = seconds_between(record.get("started"), record.get("ended"))
        elif isinstance(began, int | float):
            elapsed = max(0.0, now - began) if alive else None
        else:
            elapsed = seconds_since(record.get("started"), now) if alive else None
        pace = _pace(run, status, now)
        error = run.live.get("error") if status == "interrupted" else None
        stage = StageView(
            name=name,
            command=str(record.get("command") or ""),
            status="failed" if error and run.live.get("exit_code") else status,
            elapsed=elapsed,
            pace=pace,
            error=str(error or ""),
        )
        return View(
            out=str(found.out),
            pipeline=False,
            status=stage.status,
            over=not alive,
            elapsed=elapsed,
            eta=pace.eta if alive else None,
            stages=[stage],
            details=[_details_of(name, run)],
            alerts=dict(self.said),
        )

    def _vanished(self) -> View | None:
        """An output that was there and is gone: a run that ended before its first checkpoint keeps nothing."""
        if self._last is None:
            return None
        self._quiet += 1
        ended = [
            StageView(one.name, one.command, "interrupted", None, one.pace, "it ended before its first checkpoint")
            if one.status == "running"
            else one
            for one in self._last.stages
        ]
        over = self._quiet >= PATIENCE
        status = "interrupted" if over else self._last.status
        view = self._last
        return View(
            view.out, view.pipeline, status, over, view.elapsed, None, ended if over else view.stages, view.details,
            dict(self.said),
        )  # fmt: skip

    # --- runs and alerts ----------------------------------------------------------------------------------------------

    def _follow(self, name: str, status: str) -> None:
        """Read what is new in the files of a run, and hold the alerts against it while it runs."""
        place = self._places[name]
        run = self.runs.get(name)
        if run is None:
            run = self.runs[name] = RunWatch(place)
        elif run.folder != place:
            run.move(place)
        listening = bool(self.alerts) and status == "running" and name not in self.said
        fired: list[tuple[str, float]] = []

        def heard(figures: Mapping[str, float], steps: Mapping[str, float]) -> None:
            found = holding(self.alerts, figures)
            if found is not None and not fired:
                alert, value = found
                fired.append((alert.said(value), steps.get(alert.metric, 0)))

        run.update(heard if listening else None)
        if fired:
            self._fire(name, run.folder, *fired[0])
        elif self.alerts and run.settled:
            self._check(expected=len(self._places) > 1)

    def _check(self, expected: bool) -> None:
        """Refuse alerts about unknown metrics. expected: those of stages that have not begun are known."""
        seen = {name for run in self.runs.values() for name in run.names}
        unsure = [alert for alert in self.alerts if not (expected and is_expected(alert.metric, seen))]
        check_metrics(unsure, seen, str(self.out))

    def _fire(self, name: str, folder: Path, said: str, step: float) -> None:
        self.said[name] = f"{said} at step {step:g}"
        try:
            ask_to_end(folder, self.said[name])
        except FileNotFoundError:
            pass  # it has ended since
        except OSError as error:
            raise OutputError(
                f"alert {said}: {folder} cannot be written ({error.strerror}), so the run goes on",
                "end it where it was started, or watch as a user who may write there",
            ) from error


def _whole_time(records: Mapping[str, JsonMapping], alive: bool, now: float) -> float | None:
    """Seconds from the start of the first stage to now, or to the end of the last one."""
    begun = [str(one["started"]) for one in records.values() if one.get("started")]
    ended = [str(one["ended"]) for one in records.values() if one.get("ended")]
    if not begun or not (alive or ended):
        return None
    return seconds_since(min(begun), now) if alive else seconds_between(min(begun), max(ended))


def _pace(run: RunWatch, status: str, now: float) -> Pace:
    """How far a run is: of one that has ended the step, without a rate."""
    pace = pace_of(run.live, now)
    return pace if status == "running" else Pace(pace.step, pace.steps) if status in OPEN else Pace()


def _status(record: JsonMapping, alive: bool) -> str:
    """The status of a stage; what a killed pipeline left as running is interrupted."""
    status = str(record.get("status") or "waiting")
    return "interrupted" if status == "running" and not alive else status


def _place(root: Path, name: str, status: str) -> Path:
    """The directory of a stage's files."""
    out = root / name
    return partial_path(out) if status in OPEN and partial_path(out).is_dir() else out


def _details_of(name: str, run: RunWatch) -> Details:
    return Details(
        name=name,
        figures=dict(run.figures),
        curves={key: curve.points() for key, curve in run.curves.items()},
        guards=run.margins(),
        sample=run.sample,
        unreadable=run.metrics.unreadable,
    )


def _is_inside(name: str) -> bool:
    """Whether a stage of this name has its output in the pipeline's folder. pipeline.json may have been edited."""
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\0" not in name
