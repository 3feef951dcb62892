"""One command of the world, disturbed and started again; what must hold at every moment is asserted here."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import planted
from processes import alive, children_of
from waiting import pause, seconds_of, wait_for
from world import World, files_of, hidden
from zygote import Run, Zygote

from gemma2.core.outputs.promised import fault_of

# What a start says that finds another state than its words expect, and the word that it advises to add or drop.
ADVICE = {
    "continue it with --resume": "--resume",
    "drop --resume": "",
    "no interrupted run exists": "",
}
LOSES = ("another gemma2 process is writing", "exists; choose another --out", "an interrupted run of", "appeared while")
DONE = ("is complete, there is nothing to resume", "exists; choose another --out, or replace it with --force")


class Trial:
    """A fresh folder in which one command of the world writes `out`, as often as it takes."""

    def __init__(self, zygote: Zygote, world: World, name: str, *more: object) -> None:
        self.zygote, self.world, self.name, self.more = zygote, world, name, more
        self.folder = world.root / "trial"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.out = self.folder / "out"
        self.job = world.jobs[name]

    def start(self, *more: object, before: str = "", cwd: Path | None = None) -> Run:
        """Start the command."""
        planted_first = planted.call("forked_stages") + before
        words = self.world.line(self.name, self.out, *self.more, *more)
        return self.zygote.start(
            *words, folder=cwd or self.world.root, environment=self.job.environment, before=planted_first
        )

    def seconds(self) -> float:
        """How long it takes from the first moment of its handlers to its end."""
        marker = self.folder.with_name("marker")
        marker.unlink(missing_ok=True)
        process = self.start(before=planted.call("ready", marker))
        wait_for(marker.exists)
        return seconds_of(process.finish)

    def strike(self, number: int, moment: float, *more: object, how: str = "", **options: str) -> tuple[int, str]:
        """Send a signal `moment` seconds after the handlers are there; (exit code, stderr).

        how   "all": the signal goes to every process of the command
              "twice": a second one follows at once; "late": it follows when the first has had its second
        """
        marker = self.folder.with_name("marker")
        marker.unlink(missing_ok=True)
        process = self.start(*more, before=planted.call("ready", marker) + options.get("before", ""))
        wait_for(lambda: marker.exists() or process.poll() is not None)
        pause(moment)
        others = children_of(process.pid) if how == "all" else set()
        process.send_signal(number)
        for pid in alive(others):
            os.kill(pid, number)
        if how in ("twice", "late"):
            pause(1.2 if how == "late" else moment % 0.05)
            process.send_signal(number)
        code, _, err = process.finish()
        self.nothing_runs()
        return code, err

    def nothing_runs(self) -> None:
        """No process is left of what was started."""
        wait_for(lambda: not alive(children_of(self.zygote.pid)))

    def judge(self, number: int, code: int, err: str, how: str = "") -> str:
        """Assert the contract of an interrupted command; the state in which it left its output."""
        assert "Traceback" not in err, err
        # When the work is over, and for a second signal, the signal has its default action; a shell sees the same code.
        ends = (0, -number) if number == signal.SIGKILL else (0, 128 + number, -number)
        assert code in ends, (code, err)
        state = self.state()
        if code == 128 + number:
            lines = [line for line in err.splitlines() if line.strip()]
            notes = ("work done so far is kept", "interrupted; cleaning up", "warning: ", "note: ")
            assert [line for line in lines if not any(note in line for note in notes)] == ["interrupted"], err
        elif code == -number and number != signal.SIGKILL:
            assert state == "complete" or how == "late" or (how == "twice" and "interrupted" in err), (state, err)
        if code == 0:
            assert state == "complete"
        return state

    def state(self) -> str:
        """The state of the output: absent, complete, or the folder of a pipeline that grows."""
        if not self.out.exists():
            return "absent"
        if self.name == "pipeline" and not (self.out / "gemma2.json").exists():
            for stage in self.out.iterdir():
                if stage.is_dir() and not stage.name.startswith(".") and stage.name != "logs":
                    assert fault_of(stage) == "", stage
            return "partly there"
        assert fault_of(self.out) == ""
        return "complete"

    def go_on(self, resume: bool, *more: object) -> int:
        """Start the same command until it is done, following the advice of its errors; the number of starts."""
        flags = ["--resume"] if resume and self.job.resumes else []
        for starts in range(1, 4):
            code, _, err = self.start(*flags, *more).finish()
            if code == 0:
                return starts
            assert code == 1 and len(err.strip().splitlines()) == 1, (code, err)
            if any(text in err for text in DONE):
                assert self.state() == "complete", err
                return starts
            advised = [flag for text, flag in ADVICE.items() if text in err]
            assert advised, err
            flags = [flag for flag in advised[:1] if flag]
        raise AssertionError(f"{self.name}: three starts led to no end: {err}")

    def one_wins(self, *started: Run) -> str:
        """Of processes that were started at once one succeeds; another ends with one line, or succeeds after it."""
        ends = [process.finish() for process in started]
        codes = sorted(code for code, _, _ in ends)
        assert codes[0] == 0 and codes[-1] in (0, 1), ends
        for code, _, err in ends:
            assert "Traceback" not in err
            if code:
                assert len(err.strip().splitlines()) == 1 and any(text in err for text in LOSES), err
        return "one was refused" if codes[-1] else "one after the other"

    def check(self, expected: Mapping[str, bytes]) -> None:
        """The output has these bytes, and nothing else is left."""
        found = files_of(self.out)
        different = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        assert different == [], different
        assert fault_of(self.out) == ""
        assert hidden(self.folder) == [], hidden(self.folder)
        self.nothing_runs()
