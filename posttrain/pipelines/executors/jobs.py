"""One stage in a separate process: the job that the process gets, its events while it works, and its outcome.

The process runs the command's own function, so that an output is the same whether it was made by hand, in a pipeline or
on another machine. Its stdout and stderr go to a log file; progress and the outcome go to whoever started it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma2.core.errors import Gemma2Error, refusal
from gemma2.core.interrupts import Interrupted, Signals
from gemma2.core.outputs.staging import take_notes
from gemma2.core.permissions import allow_again
from gemma2.core.streams import settle_streams
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.finished import publish_finished
from gemma2.posttrain.runs.inputs import check_inputs, located
from gemma2.posttrain.runs.run_directory import RunOptions

from .gang import run_gang
from .job_values import STOPPED, Event, Job, Outcome

__all__ = ["Event", "Job", "Outcome", "execute"]

INTERVAL = 0.2  # seconds between two messages about one bar


class Reporter:
    """The `Progress` of a job: its messages go to `send`, at most a few times a second."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self.send = send
        self.tasks = 0

    @contextmanager
    def task(self, label: str, total: float | None, unit: str) -> Iterator[_Bar]:
        self.tasks += 1
        bar = _Bar(self.send, self.tasks)
        self.send(("task", bar.number, label, total, unit))
        try:
            yield bar
        finally:
            bar.flush()
            self.send(("end", bar.number))

    def note(self, text: str) -> None:
        self.send(("note", text))

    def warn(self, text: str) -> None:
        self.send(("warn", text))


class _Bar:
    """Collects the advance of a bar and sends it at intervals."""

    def __init__(self, send: Callable[[Event], None], number: int) -> None:
        self.send, self.number = send, number
        self.amount = 0.0
        self.fields: dict[str, float | str] = {}
        self.sent = time.monotonic()

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        self.amount += amount
        self.fields |= fields
        if time.monotonic() - self.sent >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        if self.amount or self.fields:
            self.send(("advance", self.number, self.amount, dict(self.fields)))
        self.amount, self.fields, self.sent = 0.0, {}, time.monotonic()


def execute(job: Job, send: Callable[[Event], None]) -> Outcome:
    """Run a job in this process, its output in its log. Never raises. SIGTERM: it cleans up and ends."""
    signals = Signals((signal.SIGTERM,))
    signals.install()
    try:
        with _logged(Path(job.folder, job.log)):
            settle_streams()
            outcome = _run(job, send)
        signals.ended = True
    except Interrupted:
        outcome = STOPPED
    finally:
        signals.release()
    # A library may have made another failure out of the interrupt.
    return STOPPED if outcome.code and signals.caught is not None else outcome


def _run(job: Job, send: Callable[[Event], None]) -> Outcome:
    try:
        _settle(job)
        command = COMMANDS[job.command]
        config = located(command.schema.model_validate(dict(job.options)))
        check_inputs(config)
        Path(job.out).parent.mkdir(parents=True, exist_ok=True)
        options = RunOptions(Path(job.out), job.resume, job.force)
        if job.is_gang:
            return run_gang(job, send)
        result = publish_finished(config, options) or command.run(config, options, Reporter(send))
        for note in take_notes():
            Reporter(send).note(note)
        return Outcome(0, dict(result.summary))
    except Gemma2Error as error:
        return Outcome(error.exit_code, error=str(error))
    except SystemExit as error:
        return Outcome(1, error=f"code that the stage called ended it: sys.exit({error.code!r}); take that out")
    except Exception as error:
        line = refusal(error)
        if line is not None:
            return Outcome(1, error=line)
        # A bug of the stage is shown by whoever started it, with its traceback.
        text = traceback.format_exc()
        with suppress(OSError):  # the disk of the log may be full
            sys.stderr.write(text)
        return Outcome(1, traceback=text)


def _settle(job: Job) -> None:
    """Working folder, modules, threads and devices of this process."""
    os.chdir(job.folder)
    allow_again(job.permissions)
    sys.path[:] = [*job.modules, *(path for path in sys.path if path not in job.modules)]
    if job.gpus is not None:  # before the first call of CUDA, which reads it once
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
    threads = max(1, job.cpus // job.processes)  # the processes of a gang share the stage's CPUs, as those by hand do
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # the libraries' deprecations are not the user's business
    if COMMANDS[job.command].accelerated:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append stdout and stderr of this process, native code's too, to a file while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(number) for number in (1, 2)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        yield
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, kept in zip((1, 2), saved, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        os.close(descriptor)
