"""Stages as jobs of a SLURM cluster (`--executor slurm`), on a disk that all its machines share.

    OUT/logs/STAGE.slurm/    job.sh: the batch script; job.json, events.jsonl, outcome*.json (job_process.py)
                             submitted.json: {"name", "job", "asked"}, until the outcome was read

A pipeline that is killed leaves its jobs at work. Started again, it finds those that do what it would start, and goes
on with them; one that does something else is cancelled first, so that no two write one output. An interrupt cancels
all. A job that SLURM ends (a failed machine, the time limit, memory) counts as a lost process: `retries` cover it, and
it goes on at its last checkpoint.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma2.core.interrupts import allow
from gemma2.core.json_files import JsonObject, load_json, write_json
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.outputs.promised import fault_of
from gemma2.core.yaml_files import to_yaml
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import Resources

from .job_process import Mailbox
from .job_values import Event, Job, Outcome
from .slurm_commands import GONE, LIVE, LOST, Refused, cancel, check_slurm, has_gpus, job_called, states_of, submit
from .slurm_script import Allocation, batch_script, slurm_settings

__all__ = ["SlurmExecutor"]

SUBMITTED = "submitted.json"
CPUS = 8  # of a stage that asks for none: threads of a data loader and of torch
EVERY = 10.0  # seconds between two questions to SLURM
TICK = 0.3  # seconds between two looks at the files
LATE = 30.0  # seconds by which a shared disk may show a file later, and accounting a job
GRACE = 90.0  # seconds in which cancelled jobs end
SLOW = 60.0  # seconds after which a job that waits says so
TRIES = 5  # of a submission to a controller that is busy
LAST_LINES, LAST_CHARACTERS = 3, 300  # of a log, in an error
# Of a job, what says nothing about its work.
INCIDENTAL = ("resume", "force", "modules", "permissions", "log")


@dataclass
class _Submitted:
    """A job of SLURM.

    began  when it was submitted
    ended  when it was first seen to have ended without an outcome
    """

    box: Mailbox
    number: str
    log: Path
    began: float
    ended: float = 0.0
    warned: bool = False


class SlurmExecutor:
    """At most `jobs` stages at once, each a job of SLURM. settings: of `--slurm`."""

    def __init__(self, jobs: int = 1, settings: Iterable[str] = ()) -> None:
        self.jobs = jobs
        self.settings = slurm_settings(settings)
        self.running: dict[str, _Submitted] = {}
        self.refused: dict[str, Outcome] = {}
        self.notes: list[tuple[str, Event]] = []
        self.submitting: Mailbox | None = None
        self.gpus: bool | None = None  # whether the cluster has any
        self.every, self.late = EVERY, LATE
        self.asked = 0.0  # when SLURM was asked last
        self.silent = False  # SLURM did not answer, and that was said

    def prepare(self, commands: Sequence[str]) -> None:
        """Raises UsageError on a machine without SLURM, InputError for a partition that does not exist."""
        check_slurm()
        self.gpus = has_gpus(self.settings.get("partition"))

    def cpus(self, wanted: int | None) -> int:
        """Threads of a stage: what it asks for, else the cpus-per-task of --slurm, else CPUS."""
        given = self.settings.get("cpus-per-task", "")
        return wanted or (int(given) if given.isdigit() else CPUS)

    def check(self, stage: str, wanted: Resources) -> None:
        """Nothing is refused here: sbatch knows what its cluster has."""
        return None

    def has_room(self, command: str, wanted: Resources) -> bool:
        """Whether one more stage may be submitted."""
        return len(self.running) + len(self.refused) < self.jobs

    def script(self, job: Job, wanted: Resources, name: str = "gemma2") -> str:
        """The batch script of a job; in a plan, with GPUs for every stage that runs a network."""
        accelerated = COMMANDS[job.command].accelerated and self.gpus is not False
        folder = Path(job.folder)
        asked = Allocation(
            name=name,
            nodes=job.nodes,
            cpus=job.cpus,
            gpus=int(accelerated) if wanted.gpus is None else wanted.gpus,
            log=folder / job.log,
            folder=folder,
            mailbox=folder / _mailbox_of(job),
        )
        return batch_script(asked, self.settings)

    def start(self, job: Job, wanted: Resources) -> None:
        """Submit a job, or go on with the one that an earlier pipeline has submitted for the same."""
        if self.gpus is None:
            self.prepare([job.command])
        box = Mailbox(Path(job.folder, _mailbox_of(job)), job.nodes)
        log = Path(job.folder, job.log)
        number = self._left_at_work(box, job, wanted)
        if number is None:
            try:
                self.submitting = box
                number = self._submit(box, job, wanted)
            except Refused as error:
                self.submitting = None
                self.refused[job.stage] = Outcome(1, error=f"sbatch does not take it: {error}; change --slurm")
                return
            self.notes.append((job.stage, ("note", f"job {number} of SLURM; its log is {log}")))
        else:
            self.notes.append((job.stage, ("note", f"goes on with job {number} of SLURM")))
        self.running[job.stage] = _Submitted(box, number, log, time.monotonic())
        self.submitting = None

    def _left_at_work(self, box: Mailbox, job: Job, wanted: Resources) -> str | None:
        """The number of an earlier job that does the same, and runs or is just done; any other one is ended."""
        before, number = _record(box), _number_of(box)
        if number is None:
            return None
        done = box.outcome(over=True)
        same = before.get("asked") == _asked(job, wanted)
        if done is not None:
            whole = done.code == 0 and not job.force and not fault_of(Path(job.folder, job.out))
            if same and whole:
                return number
            if box.outcome() is not None:  # of every machine
                return None
        state = (states_of([number]) or {}).get(number, "RUNNING")
        if state not in LIVE:
            return None
        if same and done is None:
            return number
        cancel([number])
        self._wait_for_end({number: box})
        return None

    def _submit(self, box: Mailbox, job: Job, wanted: Resources) -> str:
        name = f"gemma2-{secrets.token_hex(6)}"
        box.put(job)
        script = box.folder / "job.sh"
        Path(job.folder, job.log).parent.mkdir(parents=True, exist_ok=True)
        script.write_text(self.script(job, wanted, name), encoding="utf-8")
        record = {"name": name, "asked": _asked(job, wanted)}
        write_json(box.folder / SUBMITTED, record)  # before: a kill from here on leaves a job that is found by its name
        for left in range(TRIES - 1, -1, -1):
            try:
                number = submit(script)
                break
            except Refused as error:
                if not left or not error.busy:
                    raise
            time.sleep(self.every)
            if found := job_called(name):  # it was taken, and the answer was lost
                number = found
                break
        write_json(box.folder / SUBMITTED, {**record, "job": number})
        return number

    def poll(self, seconds: float) -> tuple[list[tuple[str, Event]], dict[str, Outcome]]:
        """(messages of running stages, outcomes of those that ended), after at most `seconds`."""
        until = time.monotonic() + seconds
        while True:
            events, self.notes = self.notes, []
            ended, self.refused = self.refused, {}
            for stage, one in self.running.items():
                found = one.box.events()
                events += [(stage, event) for event in found]
                if (outcome := one.box.outcome()) is not None:
                    events += [(stage, event) for event in one.box.events()]
                    ended[stage] = outcome
            if self.running and time.monotonic() - self.asked >= self.every:
                self._ask(events, ended)
            for stage in ended.keys() & self.running.keys():
                _forget(self.running.pop(stage).box)
            if events or ended or time.monotonic() >= until:
                return events, ended
            time.sleep(min(TICK, max(0.0, until - time.monotonic())))

    def _ask(self, events: list[tuple[str, Event]], ended: dict[str, Outcome]) -> None:
        """Ask SLURM about the jobs without an outcome."""
        open_ = {stage: one for stage, one in self.running.items() if stage not in ended}
        states = states_of([one.number for one in open_.values()]) if open_ else {}
        self.asked = time.monotonic()
        if states is None:
            if not self.silent:
                events += [
                    (next(iter(open_)), ("warn", "SLURM does not answer; its jobs go on, and it is asked again"))
                ]
            self.silent = True
            return
        self.silent = False
        for stage, one in open_.items():
            state = states[one.number]
            if state in LIVE:
                one.ended = 0.0
                if state == "PENDING" and not one.warned and self.asked - one.began > SLOW:
                    one.warned = True
                    events.append((stage, ("note", f"job {one.number} waits in SLURM's queue")))
                continue
            one.ended = one.ended or self.asked
            if one.box.outcome() is not None:  # written since the last look: the next one takes it
                continue
            said = one.box.outcome(over=True)
            if said is not None and said.is_cause:
                ended[stage] = said
            elif self.asked - one.ended >= self.late:
                ended[stage] = _lost(one, state, said)

    def stop(self) -> None:
        """Cancel every job and wait for its end: it keeps its last checkpoint, and cleans up."""
        jobs = {one.number: one.box for one in self.running.values()}
        if self.submitting is not None and (number := _number_of(self.submitting)):  # interrupted just then
            jobs[number] = self.submitting
        if not jobs:
            return
        allow(GRACE + 30)
        cancel([*jobs])
        for box in self._wait_for_end(jobs):
            _forget(box)
        self.running.clear()
        self.submitting = None

    def _wait_for_end(self, jobs: Mapping[str, Mailbox]) -> list[Mailbox]:
        """Wait until cancelled jobs have ended; return the mailboxes of those that have."""
        left = dict(jobs)
        until = time.monotonic() + GRACE
        while left and time.monotonic() < until:
            states = states_of([*left]) or {}
            left = {
                number: box
                for number, box in left.items()
                if states.get(number, "RUNNING") in LIVE and box.outcome() is None
            }
            time.sleep(min(1.0, self.every) if left else 0)
        return [box for number, box in jobs.items() if number not in left]

    def close(self) -> None:
        """Cancel what runs."""
        self.stop()


def _mailbox_of(job: Job) -> Path:
    return Path(job.log).with_suffix(".slurm")


def _asked(job: Job, wanted: Resources) -> str:
    """A digest of what a job does and asks for."""
    work = {name: value for name, value in asdict(job).items() if name not in INCIDENTAL}
    found = hasher()
    found.update(to_yaml({"job": work, "resources": wanted.model_dump()}).encode())
    return digest_name(found)


def _record(box: Mailbox) -> JsonObject:
    try:
        found = load_json(box.folder / SUBMITTED)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number_of(box: Mailbox) -> str | None:
    """The number of the job that was submitted for a mailbox, also where a kill came before it was noted."""
    before = _record(box)
    name = before.get("name")
    found = before.get("job") or (job_called(name) if isinstance(name, str) else None)
    return found if isinstance(found, str) else None


def _forget(box: Mailbox) -> None:
    """The outcome was read: the next start of the stage is another job."""
    (box.folder / SUBMITTED).unlink(missing_ok=True)


def _lost(one: _Submitted, state: str, left: Outcome | None = None) -> Outcome:
    """The outcome of a job that left none, or none of every machine: `left`, of the others, says no cause."""
    said = f"job {one.number} of SLURM ended"
    last = _last_lines(one.log)
    if state in LOST:
        why, _, hint = LOST[state].partition("; ")
        return Outcome(-1, error=f"{said} ({state}): {why}{last}" + (f"; {hint}" if hint else ""))
    if state == "CANCELLED":
        return Outcome(1, error=f"{said}: somebody cancelled it{last}; the same command submits it again")
    if left is not None and left.kind != "stopped":
        return left
    how = "is not known any more" if state == GONE else f"has the state {state}"
    return Outcome(-1, error=f"job {one.number} of SLURM {how}, and left no outcome{last}")


def _last_lines(log: Path) -> str:
    """The end of a log, for an error of one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    text = " | ".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:].replace(";", ",")
    return f" (its log: {text})" if text else ""
