"""One stage as a program, which a batch system starts: its job in a file, its messages and its outcome in others.

    python -m gemma2.posttrain.pipelines.executors.job_process FOLDER

    FOLDER/job.json        the job
    FOLDER/events.jsonl    a message a line, while it works
    FOLDER/outcome.json    at its end, by one rename

The folder is on the disk that all machines share. Of several machines each runs this program; number 0 writes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma2.core.json_files import load_json, write_json

from .job_values import Event, Job, Outcome, on_node

__all__ = ["Mailbox", "main"]

NODE = "SLURM_NODEID"  # number of this machine among those of the job


@dataclass
class Mailbox:
    """The files between a stage in a batch job and the pipeline that waits for it. `read` bytes of events are known."""

    folder: Path
    read: int = 0

    def put(self, job: Job) -> None:
        """Write the job, and take away what an earlier attempt has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("events.jsonl", "outcome.json"):
            (self.folder / name).unlink(missing_ok=True)
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

    def end(self, outcome: Outcome) -> None:
        """Write the outcome."""
        write_json(self.folder / "outcome.json", asdict(outcome))

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

    def outcome(self) -> Outcome | None:
        """The outcome; None until it is there."""
        try:
            found = load_json(self.folder / "outcome.json")
        except FileNotFoundError:
            return None
        return Outcome(**found)


def main(folder: Path) -> int:
    """Run the job of a folder; return its exit code."""
    from .jobs import execute

    box = Mailbox(folder)
    job, node = box.job(), int(os.environ.get(NODE, "0"))
    if node:
        return execute(on_node(job, node), lambda event: None).code
    outcome = execute(job, box.tell)
    box.end(outcome)
    return outcome.code if outcome.code >= 0 else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
