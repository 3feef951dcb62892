"""`gemma2 tiny`: the embedded student and teacher as model directories, with their training and held-out prompts.

Both networks are trained side by side, each in its own process, and cached under the user's cache directory by
the content of the modules that make them: a second call copies. The cache entry is published whole, like any output.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from gemma2.core.home import cache_folder
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.ancestry import write_card
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import now, read_manifest, versions, write_manifest
from gemma2.core.outputs.safetensors_header import parameter_count
from gemma2.core.outputs.staging import staged_output
from gemma2.core.progress import SILENT, Progress, Task
from gemma2.posttrain.data import chat
from gemma2.posttrain.models.loading import quiet_libraries, save_model
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import TinyConfig

from . import networks, pretrain, tasks
from .pretrain import RECIPES, TinySize

__all__ = ["cache_place", "ensure_cached", "run_tiny"]


def recipe_of(size: str, width: int) -> TinySize:
    """The student at a width; the teacher is the same for every student."""
    return RECIPES[size].widened(width) if size == "student" else RECIPES[size]


def cache_place(size: str, seed: int, width: int) -> Path:
    """The place of a trained network: one directory per content of the code that trains it, size, width and seed."""
    content = hashlib.sha256(torch.__version__.encode())
    for module in (chat, pretrain, tasks, networks):
        content.update(Path(str(module.__file__)).read_bytes())
    return cache_folder("tiny") / content.hexdigest()[:16] / f"{size}-{recipe_of(size, width).hidden}-{seed}"


def is_cached(place: Path) -> bool:
    """Whether a cache entry is complete and every file is what was written."""
    manifest = read_manifest(place) or {}
    return manifest.get("status") == "complete" and all(
        (place / name).is_file() and digest_file(place / name) == entry["digest"]
        for name, entry in manifest["files"].items()
    )


class _Sender:
    """Progress of a training process, sent through a pipe to the one that has the screen."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    @contextmanager
    def task(self, label: str, total: float | None, unit: str) -> Iterator[Task]:
        yield self

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        self.pipe.send((amount, fields))

    def note(self, text: str) -> None:
        return None

    def warn(self, text: str) -> None:
        return None


def train_into(place: Path, size: str, seed: int, width: int, pipe: Connection) -> None:
    """Train one network and publish it to the cache. Runs in a separate process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    quiet_libraries()
    started = now()
    model = pretrain.pretrain(recipe_of(size, width), seed, _Sender(pipe), size)
    with staged_output(place, force=True) as directory:
        save_model(model, networks.tiny_tokenizer(), directory)
        manifest = {
            "command": "tiny",
            "config": {"size": size, "seed": seed, "width": recipe_of(size, width).hidden},
            "parents": [],
            "data": [],
            "seed": seed,
            "versions": versions(),
            "started": started,
            "ended": now(),
            "status": "complete",
            "summary": {"parameters": sum(parameter.numel() for parameter in model.parameters())},
        }
        write_manifest(directory, manifest)
    pipe.close()


def ensure_cached(seed: int, width: int, progress: Progress = SILENT) -> dict[str, Path]:
    """Size -> directory of the trained networks; trains what is missing, side by side."""
    places = {size: cache_place(size, seed, width) for size in RECIPES}
    missing = [size for size, place in places.items() if not is_cached(place)]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    children, pipes = [], {}
    for size in missing:
        places[size].parent.mkdir(parents=True, exist_ok=True)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=train_into, args=(places[size], size, seed, width, sender), daemon=True)
        child.start()
        sender.close()
        children.append(child)
        pipes[size] = receiver
    try:
        _watch(pipes, progress)
        for size, child in zip(missing, children, strict=True):
            child.join()
            if child.exitcode != 0:
                raise RuntimeError(f"pre-training the {size} ended with exit code {child.exitcode}")
    finally:
        for child in children:
            child.terminate()
            child.join()
    return places


def _watch(pipes: dict[str, Connection], progress: Progress) -> None:
    """Show every training process as one bar over the steps of all, until each has closed its pipe."""
    if not pipes:
        return
    total = sum(RECIPES[size].steps for size in pipes)
    losses: JsonObject = {}
    names = {id(pipe): size for size, pipe in pipes.items()}
    open_pipes = list(pipes.values())
    with progress.task("pre-training " + " and ".join(pipes), total=total, unit="steps") as task:
        while open_pipes:
            for pipe in wait(open_pipes):
                assert isinstance(pipe, Connection)
                try:
                    amount, fields = pipe.recv()
                except EOFError:
                    open_pipes.remove(pipe)
                    continue
                losses |= {f"{names[id(pipe)]} loss": value for value in fields.values()}
                task.advance(amount, **losses)


def run_tiny(config: TinyConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """OUT/student, OUT/teacher, OUT/prompts.jsonl and OUT/heldout.jsonl."""
    with open_run("tiny", config, options) as run:
        places = ensure_cached(config.seed, config.width, progress)
        for size, place in places.items():
            shutil.copytree(place, run.path / size)
            manifest = read_manifest(place) or {}
            write_card(run.path / size, manifest, options.out / size)
            write_manifest(run.path / size, manifest)  # again, with the card among its files
        for name, rows in (
            ("prompts", tasks.questions("train", config.train_prompts, config.seed)),
            ("heldout", tasks.questions("heldout", config.heldout_prompts, config.seed)),
        ):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (run.path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        return run.finish({f"{size}_parameters": parameter_count(place) for size, place in places.items()})
