"""SLURM's programs as small scripts on PATH: they keep a table of jobs in a folder, and run the batch scripts for real.

    FOLDER/jobs/N/{options.json, state, pid}    a job; `as` is the state that it gets when it has ended
    FOLDER/{down, no-accounting, hold, lost-answer}    what a test makes of the cluster, by files of these names
    FOLDER/instead        a shell text that runs in the place of every script's last line
    FOLDER/gres           what sinfo prints

Run as a program, its first word is the name of the tool. Imported, `install` writes the tools.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

LIVE = ("PENDING", "RUNNING")
TOOLS = ("sbatch", "sacct", "squeue", "scancel", "sinfo", "srun")


def install(folder: Path) -> dict[str, str]:
    """Write the tools; return the environment in which they are found."""
    (folder / "jobs").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name in TOOLS:
        tool = folder / "bin" / name
        words = shlex.join([sys.executable, "-I", "-S", __file__, name])
        tool.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        tool.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def state(job: Path) -> str:
    return (job / "state").read_text()


def set_state(job: Path, value: str) -> None:
    aside = job / "state.tmp"
    aside.write_text(value)
    aside.replace(job / "state")


def place() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def fail(text: str) -> int:
    sys.stderr.write(text + "\n")
    return 1


def options_of(words: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (word[2:].partition("=") for word in words if word.startswith("--"))}


def sbatch(words: list[str]) -> int:
    script = Path(words[-1])
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    options = options_of([line.removeprefix("#SBATCH ").strip() for line in lines])
    if options.get("partition") == "nowhere":
        return fail("sbatch: error: invalid partition specified: nowhere")
    number = len(list((place() / "jobs").iterdir())) + 1
    job = place() / "jobs" / str(number)
    job.mkdir()
    (job / "options.json").write_text(json.dumps({**options, "script": str(script)}))
    set_state(job, "PENDING")
    words = [sys.executable, "-I", "-S", __file__, "supervise", str(number)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(words, start_new_session=True, **quiet)
    if (place() / "lost-answer").exists():
        (place() / "lost-answer").unlink()
        return fail("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    sys.stdout.write(f"{number};cluster\n")
    return 0


def supervise(words: list[str]) -> int:
    """Run the script of a job, and note its end."""
    job = place() / "jobs" / words[0]
    options = json.loads((job / "options.json").read_text())
    while (place() / "hold").exists():
        subprocess.run(["sleep", "0.05"], check=False)
    if state(job) != "PENDING":
        return 0
    text = Path(options["script"]).read_text()
    instead = place() / "instead"
    if instead.exists():
        text = text[: text.index("\nexec ") + 1] + instead.read_text()
    (job / "script.sh").write_text(text)
    more = {"SLURM_JOB_ID": words[0], "SLURM_NNODES": options["nodes"], "SLURM_NODEID": "0"}
    more |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "1"}
    with open(options["output"].strip('"').replace("%%", "%"), "ab") as output:
        process = subprocess.Popen(
            ["bash", str(job / "script.sh")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **more},
            start_new_session=True,
        )
        (job / "pid").write_text(str(process.pid))
        set_state(job, "RUNNING")
        code = process.wait()
    as_ = job / "as"
    set_state(job, as_.read_text() if as_.exists() else "FAILED" if code else "COMPLETED")
    return 0


def end(job: Path, as_: str, number: int) -> None:
    """End a job as SLURM does: a signal to its processes, then this state."""
    (job / "as").write_text(as_)
    if not (job / "pid").exists():
        set_state(job, as_)
        return
    with suppress(ProcessLookupError):
        os.killpg(int((job / "pid").read_text()), number)


def sacct(words: list[str]) -> int:
    if (place() / "no-accounting").exists():
        return fail("Slurm accounting storage is disabled")
    for number in options_of(words)["jobs"].split(","):
        job = place() / "jobs" / number
        if job.exists():
            found = state(job)
            sys.stdout.write(f"{number}|{'CANCELLED by 1000' if found == 'CANCELLED' else found}\n")
    return 0


def squeue(words: list[str]) -> int:
    options = options_of(words)
    live = [job for job in (place() / "jobs").iterdir() if state(job) in LIVE]
    if "name" in options:
        named = [job for job in live if json.loads((job / "options.json").read_text())["job-name"] == options["name"]]
        sys.stdout.write("".join(f"{job.name}\n" for job in named))
        return 0
    found = [job for job in live if job.name == options["jobs"]]
    if not found:
        return fail("slurm_load_jobs error: Invalid job id specified")
    sys.stdout.write(f"{found[0].name}|{state(found[0])}\n")
    return 0


def scancel(words: list[str]) -> int:
    for number in words:
        job = place() / "jobs" / number
        if state(job) in LIVE:
            end(job, "CANCELLED", signal.SIGTERM)
    return 0


def sinfo(words: list[str]) -> int:
    gres = place() / "gres"
    if options_of(words).get("partition") == "missing":
        return 0
    sys.stdout.write(gres.read_text() if gres.exists() else "(null)\n")
    return 0


def srun(words: list[str]) -> int:
    """One copy of the program for each machine."""
    program = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
    count = int(os.environ["SLURM_NNODES"])
    copies = [subprocess.Popen(program, env={**os.environ, "SLURM_NODEID": str(node)}) for node in range(count)]
    left, worst = {copy.pid for copy in copies}, 0
    while left:
        ended, status = os.wait()
        left.discard(ended)
        code = os.waitstatus_to_exitcode(status)
        if code and not worst:
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        worst = max(worst, abs(code))
    return worst


if __name__ == "__main__":
    tool, *rest = sys.argv[1:]
    if tool in TOOLS[:4] and (place() / "down").exists():
        sys.exit(fail(f"{tool}: error: Unable to contact slurm controller (connect failure)"))
    sys.exit(globals()[tool](rest))
