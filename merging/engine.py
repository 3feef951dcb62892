"""Carries out a merge: plan -> stream -> verify -> publish."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, Reader, open_checkpoint
from .errors import InputError, OutputError
from .kernels import prepare
from .methods import MergeRequest
from .outputs import digest_weights, now, staged_output, versions, write_manifest
from .plan import MergePlan, plan_merge
from .progress import SILENT, Progress
from .report import GroupReport, judge, mean_angle
from .stream import CUT, Stream
from .writer import Writer, copy_companions

__all__ = ["MergeResult", "merge"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge did. After a dry run `groups` is empty.

    seconds  spent in streaming, without digests and flushing to disk
    """

    plan: MergePlan
    groups: tuple[GroupReport, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The model directories."""
        return self.plan.outputs

    @property
    def summary(self) -> dict[str, Any]:
        """The report of the first output."""
        return self.summary_of(0)

    def summary_of(self, output: int) -> dict[str, Any]:
        """The report of one output, as its manifest records it."""
        etas = self.plan.request.etas
        rows = [group.as_dict() for group in self.groups]
        for row in rows:
            row["result_norm"] = row.pop("result_norms")[output]
            row["coefficients"] = row["coefficients"][output]
        return {
            **({"eta": etas[output]} if etas else {}),
            "vectors": "task vectors" if self.plan.base else "weights",
            "parameters": sum(group.parameters for group in self.groups),
            "mean_angle": mean_angle(self.groups),
            "notes": list(self.plan.notes),
            "warnings": list(self.warnings),
            "groups": rows,
        }


def merge(
    request: MergeRequest,
    *,
    out: Path,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
    cut: int = CUT,
) -> MergeResult:
    """Merge model directories into `out`, or with several etas into one directory for each below `out`.

    Each output is a model directory that appears complete or not at all. `cut` is the elements per read, a multiple of
    4096; it does not change the result.
    Raises UsageError, InputError or OutputError; before any work where that can be known.
    """
    plan = plan_merge(request, out, force)
    for line in plan.notes:
        progress.note(line)
    if dry_run:
        return MergeResult(plan)
    started = now()
    prepare(progress.note)
    with ExitStack() as stack:
        stack.enter_context(_no_empty_parents(plan.outputs[0]))
        directories = [stack.enter_context(staged_output(path, force)) for path in plan.outputs]
        result = _stream(plan, directories, progress, cut)
        with ThreadPoolExecutor(plan.request.threads) as pool:
            digests = list(pool.map(lambda model: digest_weights(model.path), plan.operands))
        for number, directory in enumerate(directories):
            copy_companions(plan.models[0].path, directory, plan.request.dtype)
            _verify(plan, directory)
            write_manifest(directory, _manifest(result, number, digests, started))
    for line in result.warnings:
        progress.warn(line)
    return result


@contextmanager
def _no_empty_parents(out: Path) -> Iterator[None]:
    """Remove the folders that were made for an output which then failed."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:  # the deepest first
            with suppress(OSError):  # not empty: another run writes there
                folder.rmdir()
        raise


def _stream(plan: MergePlan, directories: list[Path], progress: Progress, cut: int) -> MergeResult:
    """Read, merge and write all weights."""
    begin = time.perf_counter()
    passes = 2 if plan.method.adaptive else 1
    with (
        ExitStack() as stack,
        Reader.open(plan.operands) as reader,
        progress.task(f"merge {plan.request.method}", total=plan.input_bytes * passes, unit="bytes") as task,
    ):
        for model in plan.operands:
            _check_tied(plan, model, reader)
        writers = [stack.enter_context(Writer.create(directory, plan.layout)) for directory in directories]
        groups = tuple(Stream(plan, reader, writers, task, cut).run())
    return MergeResult(plan, groups, tuple(judge(plan.request.method, groups)), time.perf_counter() - begin)


def _check_tied(plan: MergePlan, model: Checkpoint, reader: Reader) -> None:
    """A stored copy of a tied tensor must be one: dropping anything else would lose weights."""
    for name, original in plan.tied.items():
        copy, kept = model.tensors[name], model.tensors[original]
        if (copy.dtype, copy.shape) != (kept.dtype, kept.shape) or not reader.same(copy, kept):
            raise InputError(
                f"{model}: {name} differs from {original}, though config.json ties them",
                'set "tie_word_embeddings" to false, or remove the one that is not meant',
            )


def _verify(plan: MergePlan, directory: Path) -> None:
    """Open the output as any reader would and compare its tensors with the plan."""
    written = {name: (t.dtype, t.shape) for name, t in open_checkpoint(directory, "output").tensors.items()}
    if written != plan.layout:
        raise OutputError(f"{directory} does not read back as it was written", "check the disk, and merge again")


def _manifest(result: MergeResult, number: int, digests: list[str], started: str) -> dict[str, Any]:
    """`gemma2.json` of one output: request, parents with their roles in the merge, and the report."""
    plan = result.plan
    here = plan.outputs[number].resolve()
    parents = [
        # "input", not "model": the role tells a trained policy's init from the models that a merge mixes.
        {
            "role": "base" if model is plan.base else "input",
            "path": os.path.relpath(model.path.resolve(), here),
            "weights": digest,
        }
        for model, digest in zip(plan.operands, digests, strict=True)
    ]
    return {
        "command": f"merge {plan.request.method}",
        "config": plan.request.options() | {"etas": list(plan.request.etas[number : number + 1])},
        "parents": parents,
        "data": [],
        "versions": versions(),
        "started": started,
        "ended": now(),
        "status": "complete",
        "summary": result.summary_of(number),
    }
