"""One stage as a program, which a batch system starts: its job in a file, its messages and its outcome in others.

    python -m gemma2.posttrain.pipelines.executors.job_process FOLDER

    FOLDER/job.json        the job
    FOLDER/events.jsonl    a message a line, while it works
    FOLDER/outcome.json    at its end, by one rename; machine N of several writes outcome-N.json

The folder is on the disk that all machines share. Of several machines each runs this program; number 0 writes events.
srun ends all of them when one ends with a code. So one that only knows that another is gone, or that rank 0 has ended
the job elsewhere, waits at its end until another has written the cause, at most CAUSE seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma2.core.json_files import load_json, write_json

from .job_values import CAUSE, Event, Job, Outcome, chosen, of_node, on_node

__all__ = ["Mailbox", "main"]

NODE = "SLURM_NODEID"  # number of this machine among those of the job
LOOK = 0.2  # seconds between two looks at what the other machines have written


@dataclass
class Mailbox:
    """The files between a stage in a batch job and the pipeline that waits for it.

    nodes  machines of the job
    read   bytes of events that are known
    """

    folder: Path
    nodes: int = 1
    read: int = 0

    def put(self, job: Job) -> None:
        """Write the job, and take away what an earlier attempt has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / "events.jsonl", *self.folder.glob("outcome*.json")):
            path.unlink(missing_ok=True)
        self.read = 0
        write_json(self.folder / "job.json", asdict(job))

    def job(self) -> Job:
        """Read the job. Raises OSError or ValueError for a folder without one."""
        found = load_json(self.folder / "job.json")
        gpus = found["gpus"]
        return Job(**{**found, "modules": tuple(found["modules"]), "gpus": None if gpus is None else tuple(gpus)})

    def tell(self, event: Event) -> None:
        """Append a message."""
        line = json.dumps(event, ensure_ascii=False) + "\n"
        with (self.folder / "events.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)

    def end(self, outcome: Outcome, node: int = 0) -> None:
        """Write the outcome of a machine."""
        write_json(self._of(node), asdict(outcome))

    def _of(self, node: int) -> Path:
        return self.folder / (f"outcome-{node}.json" if node else "outcome.json")

    def events(self) -> list[Event]:
        """The messages since the last call; a line that is not whole yet comes with the next one."""
        try:
            with (self.folder / "events.jsonl").open("rb") as file:
                file.seek(self.read)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        self.read += len(whole) + 1 if whole else 0
        return [tuple(json.loads(line)) for line in whole.splitlines()]

    def outcomes(self) -> dict[int, Outcome]:
        """The outcomes that machines have written, by their numbers."""
        found = {}
        for node in range(self.nodes):
            with suppress(FileNotFoundError):
                found[node] = Outcome(**load_json(self._of(node)))
        return found

    def outcome(self, over: bool = False) -> Outcome | None:
        """The outcome of the stage; None until it is known, or where nobody has written one.

        A failure is known when every machine has written, so that none of them writes into the mailbox of the next
        attempt, or when the job is `over`. Success is known by number 0, which writes the output.
        """
        found = self.outcomes()
        first = found.get(0)
        if first is not None and first.code == 0:
            return first
        failed = [of_node(node, one) for node, one in found.items() if one.code]
        return chosen(failed) if failed and (over or len(found) == self.nodes) else None


def main(folder: Path) -> int:
    """Run the job of a folder; return its exit code."""
    from .jobs import execute

    box = Mailbox(folder)
    job, node = box.job(), int(os.environ.get(NODE, "0"))
    box.nodes = job.nodes
    outcome = execute(on_node(job, node), lambda event: None) if node else execute(job, box.tell)
    box.end(outcome, node)
    if outcome.kind in ("lost", "followed"):
        _wait_for_cause(box)
    return outcome.code if outcome.code >= 0 else 1


def _wait_for_cause(box: Mailbox) -> None:
    """Wait until another machine has written why the stage failed, or all have written."""
    until = time.monotonic() + CAUSE
    while time.monotonic() < until:
        found = box.outcomes()
        if len(found) == box.nodes or any(one.is_cause for one in found.values()):
            return
        time.sleep(LOOK)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
