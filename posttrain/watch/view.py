"""What a watcher shows of an output at one moment, as plain records.

Texts in them are as the files hold them: who shows them escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gemma2.core.json_files import JsonMapping, JsonObject

from .guard_margins import GuardMargin
from .pace import Pace

__all__ = ["Details", "StageView", "View"]

DONE = ("complete", "not needed")


@dataclass(frozen=True)
class StageView:
    """A stage, or the only run. elapsed: seconds; None if it has not begun."""

    name: str
    command: str
    status: str
    elapsed: float | None = None
    pace: Pace = field(default_factory=Pace)
    error: str = ""


@dataclass(frozen=True)
class Details:
    """The figures of a run.

    figures  newest values by name; not finite ones are left out
    curves   (step, value) by name
    """

    name: str
    figures: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    guards: Sequence[GuardMargin]
    sample: JsonMapping | None
    unreadable: int = 0  # lines of metrics.jsonl

    def document(self, curves: bool = False) -> JsonObject:
        """The figures as plain values; with `curves` also these."""
        return {
            "figures": dict(self.figures),
            "guards": [
                {"guard": one.name, "value": one.value, "limit": one.limit, "near": one.near} for one in self.guards
            ],
            "sample": dict(self.sample) if self.sample else None,
            "unreadable_lines": self.unreadable,
            **({"curves": {name: [list(point) for point in points] for name, points in self.curves.items()}}
               if curves else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class View:
    """An output at one moment.

    status   running, complete, failed, interrupted
    over     whether nothing more will come
    details  of the stages that run; if none does, of the one that ended last
    alerts   what alerts have said, by stage
    """

    out: str
    pipeline: bool
    status: str
    over: bool
    elapsed: float | None
    eta: float | None
    stages: Sequence[StageView]
    details: Sequence[Details]
    alerts: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Stages that are settled."""
        return sum(stage.status in DONE for stage in self.stages)

    def document(self) -> JsonObject:
        """The view as plain values."""
        details = {one.name: one for one in self.details}
        return {
            "out": self.out,
            "kind": "pipeline" if self.pipeline else "run",
            "status": self.status,
            "over": self.over,
            "elapsed_seconds": self.elapsed,
            "eta_seconds": self.eta,
            "alerts": [{"stage": name, "alert": said} for name, said in self.alerts.items()],
            "stages": [
                {
                    "name": stage.name,
                    "command": stage.command,
                    "status": stage.status,
                    "elapsed_seconds": stage.elapsed,
                    "step": stage.pace.step,
                    "steps": stage.pace.steps,
                    "steps_per_second": stage.pace.rate,
                    "eta_seconds": stage.pace.eta,
                    "error": stage.error or None,
                    **(details[stage.name].document() if stage.name in details else {}),
                }
                for stage in self.stages
            ],
        }
