"""What `--gpus` and `--nodes` come to on this machine: this process alone on one GPU, or several processes.

    --gpus N          N processes, a GPU each; refused where fewer are visible
    no flag           one GPU; all that are visible if the models that are trained do not fit one, by the plan
    under torchrun    nothing is started: the flags only have to say what torchrun was asked for

A process that works alone sees one GPU: libraries that find several would use all of them, each as it thinks best.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from gemma2.core.errors import Gemma2Error, UsageError
from gemma2.core.progress import Progress
from gemma2.core.ranks import announced
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.runs.machine import CHOICE, Gpu, Memory, chosen_keys, visible_devices
from gemma2.posttrain.schemas import GenerateConfig, LaunchFields, StrategyFields, WarpConfig
from gemma2.posttrain.schemas.config import Config

from .agreement import check_shares, check_world, divides
from .launcher import Processes, run_processes
from .nodes import Meeting, meeting_of
from .strategy import needed_on_one

__all__ = ["devices", "started"]

ORDER = "CUDA_DEVICE_ORDER"
COUNT = "import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)"


def devices(asked: bool) -> tuple[Gpu, ...]:
    """Return the GPUs that a command may use.

    asked  whether a flag asks for some: then a separate process asks torch about accelerators that no driver's
           tool has named
    """
    found = visible_devices()
    if found or not asked:
        return found
    with suppress(subprocess.SubprocessError, OSError, ValueError):
        done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=120, check=True)
        return tuple(Gpu(key, Memory(math.nan, "accelerator")) for key in _keys(int(done.stdout)))
    return ()


def _keys(count: int) -> Sequence[str]:
    """The names of as many GPUs as torch sees: those that the user has chosen, of which torch sees the first ones.

    A variable that lists fewer is for other accelerators than these.
    """
    chosen = chosen_keys() or []
    return chosen[:count] if len(chosen) >= count else [str(number) for number in range(count)]


def started(config: Config, words: Sequence[str], progress: Progress) -> int | None:
    """Run the command in several processes if flags or models ask for them, and return its exit code.

    None where this process is to do the work: alone, with CUDA_VISIBLE_DEVICES narrowed to one GPU, or as one of
    several that a launcher has started.

    words  the command line after `gemma2`

    Raises UsageError for flags that this machine, this launcher or this batch cannot have.
    """
    if not isinstance(config, LaunchFields) or isinstance(config, WarpConfig):
        return None  # the stages of WARP start their processes themselves
    if "RANK" in os.environ:
        check_world(config)
        check_shares(config, announced())
        return None
    if (config.gpus or 1) * config.nodes > 1:
        _check_engine(config)
    meeting = meeting_of(config.nodes, words, os.environ)
    gpus = devices(config.gpus is not None or config.nodes > 1)
    if not gpus and (config.gpus is not None or config.nodes > 1):
        raise _no_gpu(config, words, meeting)
    count = _count(config, gpus, progress)
    check_shares(config, count * config.nodes)
    if count * config.nodes == 1:
        _narrow(gpus)
        return None
    number_as_the_driver()
    return run_processes(Processes(tuple(words), tuple(gpu.key for gpu in gpus[:count]), meeting))


def number_as_the_driver() -> None:
    """Let CUDA number GPUs as the driver's tool lists them; without this the fastest one is number 0.

    Numbers that the user has given keep their meaning.
    """
    if CHOICE not in os.environ:
        os.environ.setdefault(ORDER, "PCI_BUS_ID")


def _check_engine(config: LaunchFields) -> None:
    """Raise UsageError for answers that another program draws, which takes care of its GPUs itself."""
    if isinstance(config, GenerateConfig) and config.engine != "transformers":
        raise UsageError(
            f"--gpus and --nodes are for models in this process, --engine {config.engine} runs them elsewhere",
            "drop these flags, or give --engine transformers",
            "--gpus",
        )


def _no_gpu(config: LaunchFields, words: Sequence[str], meeting: Meeting) -> UsageError:
    """The error for flags that start processes on GPUs, where there is no GPU; torchrun starts them on CPUs."""
    here = config.gpus or 1
    program = f"--nproc-per-node {here} -m gemma2.cli.main"
    if config.nodes > 1:
        place = f"--nnodes {config.nodes} --node-rank K --master-addr {meeting.head} --master-port {meeting.port}"
        fix = (
            f"to run on CPUs, start this on each machine, K = 0 .. {config.nodes - 1}: "
            f"torchrun {place} {program} {shlex.join(words)}"
        )
    else:
        fix = f"drop --gpus; torchrun {program} ... runs {here} processes on the CPU" if here > 1 else "drop --gpus"
    asked = [f"--gpus {config.gpus}"] * (config.gpus is not None) + [f"--nodes {config.nodes}"] * (config.nodes > 1)
    flags = " ".join(asked)
    return UsageError(f"{flags}, and this machine has no GPU that torch can use", fix, flags.split()[0])


def _count(config: LaunchFields, gpus: Sequence[Gpu], progress: Progress) -> int:
    """The processes on this machine. Raises UsageError for more than there are GPUs."""
    if config.gpus is None:
        return len(gpus) if config.nodes > 1 else _as_needed(config, gpus, progress)
    if config.gpus > len(gpus):
        which = f", by {CHOICE}={os.environ[CHOICE]}" if CHOICE in os.environ else ""
        raise UsageError(
            f"--gpus {config.gpus}, and {len(gpus)} of this machine are visible{which}",
            f"give --gpus {len(gpus)}, or more machines with --nodes",
            "--gpus",
        )
    return config.gpus


def _as_needed(config: LaunchFields, gpus: Sequence[Gpu], progress: Progress) -> int:
    """One process, or as many as there are GPUs and shares of a step, if one GPU is too small for what is trained."""
    if len(gpus) < 2:
        return 1
    largest = max((gpu.memory.free for gpu in gpus if not math.isnan(gpu.memory.free)), default=math.nan)
    needed = math.nan
    if isinstance(config, StrategyFields):
        with suppress(Gemma2Error):  # of a model that cannot be read: the checks of the command say it
            needed = needed_on_one(config, largest)
    if not needed > largest:
        progress.note(f"{len(gpus)} GPUs are visible, one is used; --gpus {len(gpus)} uses all")
        return 1
    count = next(number for number in range(len(gpus), 0, -1) if divides(config, number))
    texts = sizes_apart(needed, largest)
    progress.note(
        f"{len(gpus)} GPUs are visible, {count} are used: one would need {texts[0]} and has {texts[1]}; --gpus chooses"
    )
    return count


def _narrow(gpus: Sequence[Gpu]) -> None:
    """Leave this process one GPU, that with most free memory, if it sees several."""
    number_as_the_driver()
    if len(gpus) > 1:
        best = max(gpus, key=lambda gpu: -1.0 if math.isnan(gpu.memory.free) else gpu.memory.free)
        os.environ[CHOICE] = best.key
