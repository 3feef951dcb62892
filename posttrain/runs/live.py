"""Two small files in the partial directory of a run, between it and `gemma2 watch`. Torch-free.

    .live.json    written by the run: {"label", "step", "steps", "began", "times": [[seconds since 1970, step], ...],
                  "error", "exit_code"}
    .alert.json   written by the watcher: {"said"}; the run ends with AlertStop before its next optimizer step

Times are not in metrics.jsonl, which is the same to the byte after an interruption. A file in place of a signal needs
no process id, so that no other process can be hit, and works from another machine on a shared disk.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import Gemma2Error
from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.core.outputs.safetensors_header import printable

__all__ = ["LiveRecord", "ask_to_end", "clear_live", "read_live", "take_alert"]

LIVE, ALERT = ".live.json", ".alert.json"
INTERVAL = 1.0  # seconds between two writes
KEPT = 32  # times, from which the recent rate follows
LONGEST = 200  # characters of an alert


@dataclass
class LiveRecord:
    """Writes `.live.json` while a training runs. A disk that refuses it does not end the training."""

    folder: Path
    label: str
    step: int = 0
    steps: int = 0
    began: float = 0.0
    times: list[tuple[float, int]] = field(default_factory=list)

    def begin(self, step: int, steps: int) -> None:
        """The training goes on from `step`, of `steps`."""
        self.began = time.time()
        self.step, self.steps, self.times = step, steps, [(self.began, step)]
        self._write()

    def advance(self, step: int) -> None:
        """A step is done."""
        self.step = step
        now = time.time()
        if now - self.times[-1][0] >= INTERVAL or step == self.steps:
            self.times = [*self.times[1 - KEPT :], (now, step)]
            self._write()

    def end(self, error: BaseException | None) -> None:
        """The training is over, or this error ended it."""
        if error is None:
            self._write()
        elif isinstance(error, Gemma2Error):
            self._write(error=str(error), exit_code=error.exit_code)
        else:
            self._write(error=type(error).__name__.lower() if not isinstance(error, Exception) else repr(error))

    def _write(self, error: str | None = None, exit_code: int | None = None) -> None:
        figures = {"label": self.label, "step": self.step, "steps": self.steps, "began": self.began}
        with suppress(OSError):
            _replace(self.folder / LIVE, {**figures, "times": self.times, "error": error, "exit_code": exit_code})


def _replace(path: Path, value: JsonMapping) -> None:
    """Replace a file in one rename, without the flush of `write_json`, which takes as long as a small step."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")
    aside.replace(path)


def read_live(folder: Path) -> JsonObject:
    """Return `.live.json` of a run; empty if it is missing or not readable."""
    return _read(folder / LIVE)


def ask_to_end(folder: Path, said: str) -> None:
    """Ask the run in a partial directory to end. Raises OSError if nothing can be written there."""
    _replace(folder / ALERT, {"said": said})


def take_alert(folder: Path) -> str | None:
    """Return what a watcher asks this run to end for, and remove the question; None if nobody asks."""
    path = folder / ALERT
    if not path.exists():
        return None
    said = printable(str(_read(path).get("said") or "no reason is given"), LONGEST)
    path.unlink(missing_ok=True)
    return said


def clear_live(folder: Path) -> None:
    """Remove both files: they belong to one process of one run, not to its output."""
    for name in (LIVE, ALERT):
        for path in (folder / name, folder / f"{name}.tmp"):
            path.unlink(missing_ok=True)


def _read(path: Path) -> JsonObject:
    try:
        value = load_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
