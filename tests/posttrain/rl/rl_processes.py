"""Several runs of `gemma2` one after another in the same processes, started by torchrun: a start costs ten seconds."""

import json
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
from processes import BARE_CHECKOUT
from rl_job import environment, words, write_job
from safetensors.torch import load_file
from waiting import wait_for

from gemma2.posttrain.tiny.networks import save_random

SECONDS = 270

# Every line of a file is a command line; the exit codes of rank 0 go to a file next to it.
SCRIPT = """
import json, os, sys
from pathlib import Path
from gemma2.cli import main as command
command.leave_job = lambda code: None  # the next run needs the group of processes
main = command.main
if __name__ == "__main__":
    file, codes = Path(sys.argv[1]), []
    for line in json.loads(file.read_text()):
        sys.argv = ["gemma2", *line]
        try:
            main()
            codes.append(0)
        except SystemExit as end:
            codes.append(end.code or 0)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        file.with_suffix(".codes").write_text(json.dumps(codes))
"""

# A reward that fails at a step, once: the run is then interrupted after its last checkpoint, on every process.
JUDGE = """
from pathlib import Path
def judge(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]
calls = 0
def failing(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 8:
        raise RuntimeError("interrupted")
    return judge(prompts, completions)
"""


def write_sharded_job(root: Path) -> Path:
    """A folder as that of `rl_job`, with reward models and a function that fails once."""
    write_job(root)
    (root / "judge.py").write_text(JUDGE, encoding="utf-8")
    (root / "several.py").write_text(BARE_CHECKOUT + SCRIPT, encoding="utf-8")
    save_random(root / "other", 3)
    for seed in (1, 2):
        save_random(root / f"reward-{seed}", seed, "reward")
    return root


def line(job: Path, out: str, settings: str = "") -> list[str]:
    """A command line of `rlhf`: five steps, checkpoints after two and four."""
    shared = "--steps 5 --prompts-per-step 4 --n 3 --save-every 2 --eval-every 3 --quiet"
    return [*words(job, job / out, f"{shared} {settings}")]


def run_lines(job: Path, processes: int, lines: Sequence[Sequence[str]], launcher: Sequence[str] = ()) -> list[int]:
    """Run command lines one after another in the same processes: the exit code of each. One needs no torchrun."""
    file = job / f"{processes}-{uuid.uuid4().hex}.json"
    file.write_text(json.dumps(lines), encoding="utf-8")
    started = [sys.executable, "-m", "torch.distributed.run", *(launcher or ["--standalone"])]
    started += ["--nproc-per-node", str(processes), "--"]
    start = [sys.executable] if processes == 1 and not launcher else started
    done = subprocess.run(
        [*start, str(job / "several.py"), str(file)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(job),
        check=False,
    )
    assert file.with_suffix(".codes").exists(), done.stderr[-3000:]
    codes: list[int] = json.loads(file.with_suffix(".codes").read_text(encoding="utf-8"))
    return codes


def kill_one(job: Path, processes: int, words: Sequence[str], partial: Path, step: int) -> None:
    """Start a command line, and end one of its processes by SIGKILL in a step; the launcher ends the others."""
    file = job / f"killed-{partial.name}.json"
    file.write_text(json.dumps([words]), encoding="utf-8")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen([*line, str(job / "several.py"), str(file)], env=environment(job), **pipes)
    reached = partial / "metrics.jsonl"

    def there() -> bool:
        saved = list(partial.glob("checkpoints/checkpoint-*/complete.json"))
        return bool(saved) and f'"step": {step},' in reached.read_text(encoding="utf-8")

    wait_for(lambda: there() or launcher.poll() is not None)
    assert launcher.poll() is None
    children_of_it = psutil.Process(launcher.pid).children(recursive=True)
    next(child for child in children_of_it if child.environ().get("RANK") == "1").kill()
    assert launcher.wait(SECONDS) != 0


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def furthest(one: Path, other: Path, names: Sequence[str]) -> float:
    """The largest relative difference of these figures between two runs, over all their lines; of a KL in nats.

    The loss of REINFORCE crosses zero: it is compared with the largest of the run.
    """
    pairs = list(zip(metrics(one), metrics(other), strict=True))
    assert pairs and all(left.keys() == right.keys() for left, right in pairs)
    largest = max((abs(left["loss"]) for left, _ in pairs if left.get("loss") is not None), default=0.0)
    least = {"kl_anchor": 1.0, "loss": largest}
    found = [
        abs(left[name] - right[name]) / max(abs(left[name]), least.get(name, 1e-3))
        for left, right in pairs
        for name in names
        if left.get(name) is not None
    ]
    assert found
    return max(found)


def apart(one: Path, other: Path) -> float:
    """The largest relative difference between two tensors of the same name in two files."""
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).norm() / left[name].norm()) for name in left)
