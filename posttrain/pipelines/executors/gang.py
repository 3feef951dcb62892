"""A stage of several processes: the command is started as by hand, `gemma2 rlhf ... --gpus 8 --nodes 2`.

posttrain/launch does the rest there: it starts the processes, joins machines, and ends all when one ends. Here the
stage's process waits, passes the steps on (`.live.json` of the run), and takes the outcome from the document that
`--json` prints. Which machine this is, the environment says: SLURM's variables are there already; for Ray those of
torchrun are set.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gemma2.core.interrupts import allow
from gemma2.core.json_files import JsonObject, parse_json
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.staging import partial_path
from gemma2.core.yaml_files import to_yaml
from gemma2.posttrain.runs.live import read_live

from .job_values import Event, Job, Outcome

__all__ = ["command_line", "run_gang"]

LOOK = 0.5  # seconds between two looks at the steps
GRACE = 60.0  # seconds that an interrupted command gets
PROGRAM = ("-m", "gemma2.cli.main")
SIGNALLED = 128  # exit codes of a shell above this are signals


def command_line(job: Job, settings: Path) -> list[str]:
    """The words of the command after the interpreter. settings: the file with the options of the job."""
    words = [*PROGRAM, *job.command.split(), "--config", str(settings), "--gpus", str(job.processes)]
    if job.nodes > 1:
        words += ["--nodes", str(job.nodes)]
    words += ["--resume"] * job.resume + ["--force"] * job.force
    return [*words, "--out", job.out, "--json", "--quiet"]


def run_gang(job: Job, send: Callable[[Event], None]) -> Outcome:
    """Run a job of several processes; in a process whose folder, modules and devices are those of the job.

    An exception of this process (an interrupt) ends the command as SIGTERM does, and is raised again when it has ended.
    """
    settings = Path(job.log).with_suffix(".yaml")
    settings.write_text(to_yaml(dict(job.options)), encoding="utf-8")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed, tempfile.TemporaryFile("w+b") as said:
        process = subprocess.Popen(
            [sys.executable, *command_line(job, settings)],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=said,
            env=_environment(job),
        )
        try:
            with _steps(job, send) as look:
                while True:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(LOOK)
                        break
                    look()
        except BaseException:
            _end(process)
            raise
        finally:
            _copy_to_log(said)
        printed.seek(0)
        said.seek(0)
        return _outcome(job, process.returncode, printed.read(), said.read().decode(errors="backslashreplace"))


def _environment(job: Job) -> dict[str, str]:
    """Modules, and for machines that Ray has found: their number, which one this is, and where they meet."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(path for path in job.modules if path)
    if job.head:
        host, _, port = job.head.rpartition(":")
        found |= {"PET_NNODES": str(job.nodes), "PET_NODE_RANK": str(job.node)}
        found |= {"PET_MASTER_ADDR": host, "PET_MASTER_PORT": port}
    return found


@contextmanager
def _steps(job: Job, send: Callable[[Event], None]) -> Iterator[Callable[[], None]]:
    """Yield a function that sends what the run has done since the last call, as one bar."""
    folder = partial_path(Path(job.out))
    shown: list[int] = []  # the step that was sent last

    def look() -> None:
        live = read_live(folder)
        step, steps = live.get("step"), live.get("steps")
        if not isinstance(step, int) or not isinstance(steps, int):
            return
        if not shown:
            send(("task", 1, str(live.get("label") or job.command), steps, "steps"))
            shown.append(0)
        if step > shown[0]:
            send(("advance", 1, step - shown[0], {}))
            shown[0] = step

    try:
        yield look
    finally:
        if shown:
            send(("end", 1))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command as Ctrl-C does, and wait: it keeps its last checkpoint."""
    allow(GRACE + 5)
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _copy_to_log(said: IO[bytes]) -> None:
    said.seek(0)
    with suppress(OSError):  # the disk of the log may be full
        while block := said.read(1 << 16):
            os.write(2, block)


def _outcome(job: Job, code: int, printed: str, said: str) -> Outcome:
    """The outcome of a command that ended with this code, from what it printed."""
    if code == 0:
        manifest = read_manifest(Path(job.out)) if job.node == 0 else None
        return Outcome(0, dict((manifest or {}).get("summary") or {}))
    found = _document(printed).get("error")
    error = found if isinstance(found, dict) else {}
    what, fix = str(error.get("what") or ""), str(error.get("fix") or "")
    if error.get("kind") == "bug":
        return Outcome(1, traceback=said[said.rfind("Traceback (most recent call last)") :] or what)
    line = f"{what}; {fix}" if what and fix else what
    if error.get("kind") == "lost":  # as a process that was killed: the pipeline may try again
        return Outcome(-1, error=line, kind="lost")
    if error.get("kind") == "followed":
        return Outcome(code, error=line, kind="followed")
    if code < 0 or code > SIGNALLED:
        number = -code if code < 0 else code - SIGNALLED
        return Outcome(-number, error=line or f"its command was ended by {signal.Signals(number).name}")
    last = (said.strip().splitlines() or ["without a word"])[-1].removeprefix("error: ")
    return Outcome(code, error=line or f"its command ended with exit code {code}: {last}")


def _document(printed: str) -> JsonObject:
    try:
        found = parse_json(printed)
    except (ValueError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
