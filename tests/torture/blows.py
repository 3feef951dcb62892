"""One call of a command that fails, or is its last: the calls to choose from, the blow, and what must hold after it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import planted
from world import World, files_of, hidden
from zygote import COUNT, FULL, HALF, INTERRUPTED, KILL, READ_ONLY, VANISHED, Fault, Zygote

from gemma2.core.outputs.manifest import CHECKPOINTS, MANIFEST, STATE
from gemma2.core.outputs.promised import fault_of

# What differs between runs or checkpoints in the name of a file -> how all of them are called here.
PATTERNS = (
    (r"^\.out\.(partial|tmp-\d+-\w+)\b", ".out.#"),
    (r"\.tmp-\d+-\w+", ".tmp-#"),
    (r"\.tmp\w{6}$", ".tmp#"),
    (r"(checkpoint|data|point|chunk)-\d+", r"\1-#"),
    (r"-of-\d+", "-of-#"),
)
FLUSHES = ("fsync", "fdatasync")
WRITES = ("write", "pwrite", "pwrite64", "writev", "sendfile", "sendfile64", "copy_file_range")
# What a start says that finds another state than its words expect -> the words that it advises in their place.
ADVICE = {"continue it with --resume": ["--resume"], "drop --resume": []}
DONE = ("is complete, there is nothing to resume", "exists; choose another --out, or replace it with --force")
STARTS = 3
SHARE = float(os.environ.get("GEMMA2_TORTURE_SHARE", "1"))
ALL = 10  # a share from which on every call is struck


@dataclass(frozen=True)
class Call:
    """A call that changes a file. grows: a full disk refuses it."""

    number: int
    name: str
    grows: bool
    path: str

    @property
    def kind(self) -> tuple[str, str]:
        """Its name and the file, the same at every checkpoint and in every run."""
        path = self.path
        for pattern, plain in PATTERNS:
            path = re.sub(pattern, plain, path)
        return self.name, path


@dataclass(frozen=True)
class Mode:
    """A kind of blow.

    counts   the name of its figure
    fits     whether a call is worth this blow: a kill before a flush leaves what a kill before the next call leaves,
             and a disk that is full from here on is full at the next call that needs room
    every    of the calls that fit, one of so many
    """

    how: int
    counts: str
    fits: Callable[[Call], bool]
    every: int = 1


MODES = {
    "kill": Mode(KILL, "SIGKILL", lambda call: call.name not in FLUSHES),
    "full": Mode(FULL, "disk full from here", lambda call: call.grows, 3),
    "eio": Mode(errno.EIO, "EIO", lambda _: True, 8),
    "half": Mode(HALF, "half a write", lambda call: call.name in WRITES, 4),
    "interrupted": Mode(INTERRUPTED, "EINTR", lambda _: True, 10),
    "read-only": Mode(READ_ONLY, "read-only from here", lambda _: True, 12),
    "vanished": Mode(VANISHED, "folder of --out moved away", lambda _: True, 12),
}


def read_calls(log: Path) -> list[Call]:
    """The calls that a run has made."""
    lines = (line.split(" ", 3) for line in log.read_text("utf-8").splitlines())
    return [Call(int(number), name, grows == "1", path) for number, name, grows, path in lines]


def chosen(calls: list[Call], mode: Mode, share: float = 1.0) -> list[Call]:
    """One call of each kind, in turn the first, one in the middle and the last; of all these one of `mode.every`.

    The calls of one kind are those of the same name on the same file of each checkpoint. From share ALL on, every call.
    """
    kinds: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        if mode.fits(call):
            kinds.setdefault(call.kind, []).append(call)
    if share >= ALL:
        return [call for same in kinds.values() for call in same]
    picked = [same[(0, len(same) // 2, -1)[place % 3]] for place, same in enumerate(kinds.values())]
    step = max(mode.every / share, 1.0)
    return [picked[int(place * step)] for place in range(max(int(len(picked) / step), 1))] if picked else []


def replacing(calls: list[Call]) -> list[Call]:
    """The calls of a run with --force from the moment on at which the new output is complete."""
    complete = [place for place, call in enumerate(calls) if call.kind == ("rename", f".out.#/{MANIFEST}")]
    return calls[complete[-1] :]


class Place:
    """A folder in which one command of the world writes `out`.

    old   an output that is there before
    """

    def __init__(self, zygote: Zygote, world: World, name: str, *more: object, old: Path | None = None) -> None:
        self.zygote, self.world, self.name, self.more, self.old = zygote, world, name, more, old
        self.folder = world.root / "blow"
        self.gone = world.root / "blow.gone"
        self.out = self.folder / "out"
        self.log = world.root / "log"
        self.before = planted.call("forked_stages") if name in ("pipeline", "warp") else ""

    def afresh(self) -> Place:
        """Begin again with an empty folder."""
        for path in (self.folder, self.gone):
            shutil.rmtree(path, ignore_errors=True)
        self.folder.mkdir()
        if self.old is not None:
            shutil.copytree(self.old, self.out)
        return self

    def run(self, *more: object, number: int = 0, how: int = COUNT) -> tuple[int, str, list[Call]]:
        """Run the command; its exit code, stderr and the calls that it made."""
        self.log.unlink(missing_ok=True)
        code, _, err = self.zygote.run(
            *self.world.line(self.name, self.out, *self.more, *more),
            folder=self.world.root,
            environment=self.world.jobs[self.name].environment,
            before=self.before,
            fault=Fault(self.folder, number, how, self.log),
        )
        return code, err, read_calls(self.log) if self.log.exists() else []

    def blow(self, call: Call, mode: Mode, results: list[Mapping[str, bytes]]) -> str:
        """Strike at a call, go on, and say what is wrong; nothing is if the text is empty.

        results  the bytes of the right output, and of those that may stand in its place after the blow
        """
        before = _inputs(self.world.root)
        code, err, made = self.run(number=call.number, how=mode.how)
        faults = [_wrong_end(code, err, mode.how)]
        if self.gone.exists():
            faults.append(f"{self.folder} was made again" if self.folder.exists() else "")
            shutil.rmtree(self.folder, ignore_errors=True)
            self.gone.rename(self.folder)
        complete = self._complete()
        faults.append("exit code 0 without an output" if code == 0 and not complete else "")
        if self.out.exists() and self.name != "pipeline":
            faults.append("" if any(_settled(self.out) == one for one in results) else "the output is mixed")
        new = complete and _settled(self.out) == results[0]  # then a start with --force begins anew, as it should
        kept = 0 if new and "--force" in self.more else _last_checkpoint(made)
        if code or hidden(self.folder) or (self.out / STATE).exists():
            faults.append(self._go_on(kept))
        faults += [self._judge_result(results[0]), "" if _inputs(self.world.root) == before else "inputs changed"]
        return "; ".join(fault for fault in faults if fault)

    def _complete(self) -> bool:
        return self.out.exists() and not fault_of(self.out)

    def _go_on(self, kept: int) -> str:
        """Start again, by the letter of what errors advise, until it is done."""
        words = ["--resume"] if self.world.jobs[self.name].resumes else []
        said = ""
        for _ in range(STARTS):
            code, err, made = self.run(*words)
            if code == 0:
                again = [call.path for call in made if 0 < _checkpoint(call) <= kept and call.name in ("open", "mkdir")]
                return f"checkpoint {kept} was complete, and {again[0]} was made again" if again else ""
            said = err.strip()
            if "Traceback" in said or len(said.splitlines()) != 1:
                return f"next start: {said[-600:]}"
            if self._complete() and any(text in said for text in DONE):
                return ""
            advised = [flags for text, flags in ADVICE.items() if text in said]
            if not advised:
                return f"next start advises nothing that helps: {said}"
            words = advised[0]
        return f"{STARTS} starts led to no end: {said}"

    def _judge_result(self, expected: Mapping[str, bytes]) -> str:
        found = files_of(self.out) if self.out.exists() else {}
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        faults = [f"in the end other bytes: {', '.join(different)}" if different else ""]
        faults.append(f"in the end the output {fault_of(self.out)}" if fault_of(self.out) else "")
        left = [name for name in hidden(self.folder) if name != ".out.lock"]
        faults.append(f"left behind: {', '.join(left)}" if left else "")
        return "; ".join(fault for fault in faults if fault)


def _wrong_end(code: int, err: str, how: int) -> str:
    """What is wrong with the end of a command that was struck."""
    if how == KILL:
        return "" if code == -9 else f"exit code {code}"
    errors = [line for line in err.splitlines() if line.startswith("error")]
    if "Traceback" in err or code not in (0, 1) or len(errors) != code:
        return f"exit code {code}, {err.strip()[-700:]!r}"
    return ""


def _settled(out: Path) -> dict[str, bytes]:
    """The files of an output without the resume state, which goes after it has come."""
    return {
        name: data for name, data in files_of(out).items() if name != STATE and not name.startswith(f"{CHECKPOINTS}/")
    }


def _checkpoint(call: Call) -> int:
    found = re.search(r"checkpoints/checkpoint-(\d+)", call.path)
    return int(found[1]) if found else 0


def _last_checkpoint(made: list[Call]) -> int:
    """The step of the last checkpoint that was complete; the last call is the one that failed."""
    return max((_checkpoint(call) for call in made[:-1] if call.path.endswith("/complete.json")), default=0)


def _inputs(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of the world that no trial writes."""
    found = {}
    for folder, names, files in os.walk(root):
        if Path(folder) == root:
            names[:] = [name for name in names if name in ("policy", "base", "other")]
        for name in files:
            status = os.stat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
    found.pop(str(root / "log"), None)
    return found
