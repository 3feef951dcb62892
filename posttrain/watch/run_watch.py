"""Follows the files of one run: its metrics, its newest sample, its progress. Every look reads only what is new."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.core.outputs.manifest import MANIFEST, STATE
from gemma2.posttrain.runs.live import read_live

from .curve import Curve
from .guard_margins import GuardMargin, is_without_variance, margins_of
from .line_tail import LineTail
from .metric_names import HELDOUT

__all__ = ["RunWatch"]

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
ALONE = ("kl", "divergence")  # figures of evaluations that steps do not have under the same name
NO_FIGURES = {"step", "kind"}
# Metrics that are drawn over the steps, and those of evaluations.
DRAWN = {"reward", "kl", "kl_anchor", "length", "loss", "divergence", "accuracy"}
MOST_METRICS = 200  # by name; more is not a file of ours


@dataclass
class RunWatch:
    """What the files of a run say.

    figures   newest value of every metric; those of evaluations as `heldout_NAME`, except `kl`
    steps_of  step of the newest value
    dead      last steps in a row without variance of the reward
    settled   whether lines of every kind that the run writes have been seen
    """

    folder: Path
    figures: dict[str, float] = field(default_factory=dict)
    steps_of: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    sample: JsonObject | None = None
    live: JsonObject = field(default_factory=dict)
    dead: int = 0
    trained: bool = False
    evaluated: bool = False
    _record: JsonMapping = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics, self.samples = LineTail(self.folder / METRICS), LineTail(self.folder / SAMPLES)
        self._forget()

    def move(self, folder: Path) -> None:
        """The run is complete, and its directory has its final name."""
        self.folder = folder
        self.metrics.path, self.samples.path = folder / METRICS, folder / SAMPLES

    def update(self, heard: Callable[[Mapping[str, float], Mapping[str, float]], None] | None = None) -> bool:
        """Look at the files. True if there is anything new. heard: gets the figures of a new line, and their steps.

        Of lines from before the first look, and of those that a resume left, `heard` gets the newest values only.
        """
        first = self.metrics.offset == 0
        if self.metrics.restarted():
            self._forget()
            first = True
        before, moved = self.metrics.offset, False
        for row in self.metrics.rows():
            figures = self._add(row)
            if figures and heard is not None and not first:
                heard(figures, dict.fromkeys(figures, float(row["step"])))
        if first and heard is not None and self.figures:
            heard(self.figures, self.steps_of)
        moved = self.metrics.offset != before or first
        self.samples.restarted()
        for row in self.samples.rows():
            self.sample, moved = row, True
        live = read_live(self.folder)
        if live and live != self.live:
            self.live, moved = live, True
        return moved

    @property
    def record(self) -> JsonMapping:
        """run.json, or gemma2.json of a finished run; empty if neither can be read. Read once."""
        if not self._record:
            for name in (MANIFEST, STATE):
                try:
                    found = load_json(self.folder / name)
                except (OSError, ValueError, RecursionError):
                    continue
                if isinstance(found, dict):
                    self._record = found
                    break
        return self._record

    @property
    def config(self) -> JsonMapping:
        """The settings of the run."""
        found = self.record.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def settled(self) -> bool:
        """Whether the names of all metrics are known."""
        return self.trained and (self.evaluated or not self.config.get("eval_every"))

    def margins(self) -> list[GuardMargin]:
        """How near the guards are."""
        return margins_of(self.config, self.figures, self.dead)

    def _forget(self) -> None:
        self.figures, self.steps_of, self.curves, self.names = {}, {}, {}, set()
        self.dead, self.trained, self.evaluated, self._last_step = 0, False, False, 0.0
        self._record = {}
        # name in the file -> name here, for lines of steps and of evaluations
        self._ours: dict[bool, dict[str, str | None]] = {False: {}, True: {}}

    def _add(self, row: JsonMapping) -> dict[str, float]:
        """Take in a line; return its figures under both the names of the file and ours."""
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int | float):
            return {}
        evaluation = row.get("kind") == "eval"
        ours = self._ours[evaluation]
        found: dict[str, float] = {}
        for name, value in row.items():
            if name not in ours:
                self._meet(name, evaluation)
            kept = ours[name]
            if kept is None:
                continue
            number = _as_float(value)
            if number is None:
                if value is None:
                    self.figures.pop(kept, None)  # it is undefined, or not finite
                continue
            found[name] = found[kept] = self.figures[kept] = number
            self.steps_of[kept] = step
            if kept in self.curves:
                self.curves[kept].add(step, number)
        if not evaluation and "learning_rate" in row:
            self.trained = True
            # A line may stand for several steps (--log-every).
            self.dead = self.dead + int(step - self._last_step) if is_without_variance(row) else 0
            self._last_step = step
        return found

    def _meet(self, name: str, evaluation: bool) -> None:
        """Decide once how the figures of a name are kept; None: they are not figures."""
        ours = _renamed(name, evaluation)
        self.evaluated |= evaluation or name.startswith(HELDOUT)
        if name in NO_FIGURES or len(self.names) >= MOST_METRICS:
            self._ours[evaluation][name] = None
            return
        self._ours[evaluation][name] = ours
        self.names |= {name, ours}
        if ours.removeprefix(HELDOUT) in DRAWN:
            self.curves[ours] = Curve()


def _as_float(value: object) -> float | None:
    """A number as a float, None for anything else."""
    if isinstance(value, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    try:
        return float(value)
    except OverflowError:  # of more than 308 digits
        return math.inf if value > 0 else -math.inf


def _renamed(name: str, evaluation: bool) -> str:
    """The name under which a figure is kept: steps and evaluations do not share one."""
    alone = name.startswith(HELDOUT) or name.partition("_")[0] in ALONE
    return HELDOUT + name if evaluation and not alone else name
