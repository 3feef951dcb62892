"""Three steps of a training as a separate process, timed: `gemma2 plan COMMAND --measure`. Torch-free here.

The command line is that of the run, with three steps and an output that is removed. The time of a step is that between
two lines of its metrics; the first step, which warms up, does not count.
"""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.runs.commands import spell
from gemma2.posttrain.runs.inputs import ROWS, inputs_of, paths_of
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config

from .durations import Trial
from .named_models import NO_ROWS

__all__ = ["STEPS", "try_steps"]

STEPS = 3
TRAINING: dict[type[Config], str] = {
    SftConfig: "sft",
    RewardConfig: "reward",
    DistillConfig: "distill",
    RlhfConfig: "rlhf",
}
# Fields of the trial, where the command has them; the steps of its two kinds of commands are added.
SHORT: JsonMapping = {"eval_every": 10**6, "save_every": 10**6, "eval_prompts": 2, "log_every": 1, "report_to": ()}
THROUGHPUT = "give --throughput TOKENS/S, for the time"
INTERVAL = 0.002  # seconds between two looks at the metrics
METRICS = "metrics.jsonl"


def try_steps(config: Config) -> Trial:
    """Run the first steps of a training here and return what they took.

    Raises UsageError for a command that does not train, InputError if the trial fails.
    """
    command = TRAINING.get(type(config))
    if command is None:
        raise UsageError("--measure tries the first steps of a training", THROUGHPUT)
    for role, path in inputs_of(config).items():
        if not weight_files(path):
            raise UsageError(f"--measure runs the command here, where --{role} {path} has no weights", THROUGHPUT)
    if NO_ROWS in [path for name in ROWS for path in paths_of(config, name)]:
        raise UsageError("--measure runs the command here, and no rows are given", THROUGHPUT)
    with tempfile.TemporaryDirectory(prefix="gemma2-plan-") as folder:
        out = Path(folder, "trial")
        words = shlex.split(spell(command, _short(config), out))[1:]
        times = _times([sys.executable, "-m", "gemma2.cli.main", *words, "--quiet"], partial_path(out) / METRICS, out)
    if len(times) < 2:
        raise InputError(f"the trial ended after {len(times)} of {STEPS} steps", "run it with more rows, or steps")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Trial(len(times), (times[-1] - times[0]) / (len(times) - 1), float(peak))


def _short(config: Config) -> Config:
    """The configuration of the trial."""
    fields = type(config).model_fields
    update: dict[str, object] = {name: value for name, value in SHORT.items() if name in fields}
    update |= {"max_steps": STEPS} if "max_steps" in fields else {"steps": STEPS}
    update |= {"warmup_steps": None, "patience": None, "keep": "last"}
    return config.model_copy(update={name: value for name, value in update.items() if name in fields})


def _times(command: Sequence[str], metrics: Path, out: Path) -> list[float]:
    """Run a command; the moments at which lines of training steps appeared. Raises InputError with its last words."""
    times: list[float] = []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while process.poll() is None:
                steps = _steps(metrics)
                times += [time.monotonic()] * (steps - len(times))
                time.sleep(INTERVAL)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        times += [time.monotonic()] * (_steps(out / METRICS) - len(times))
        if process.returncode:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise InputError(f"the trial of --measure failed: {last.removeprefix('error: ')}", "fix that first")
    return times


def _steps(metrics: Path) -> int:
    """Lines of training steps so far."""
    try:
        return metrics.read_text(encoding="utf-8").count('"learning_rate"')
    except FileNotFoundError:
        return 0
