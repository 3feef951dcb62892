"""Runs a merge: plan -> stream -> verify -> publish."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.ancestry import write_card
from gemma2.core.outputs.digests import digest_input
from gemma2.core.outputs.manifest import DataRecord, Manifest, now, versions, write_manifest
from gemma2.core.outputs.model_card import Account
from gemma2.core.outputs.model_identity import ModelIdentity, identity_of, parent_record
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.outputs.staging import staged_output
from gemma2.core.progress import SILENT, Progress, Task

from .inputs.checkpoint import Reader
from .inputs.families import tower_note
from .inputs.output_heads import check_copies
from .kernels.native import announced
from .methods.request import MergeRequest
from .plan.merge_plan import MergePlan, plan_merge
from .plan.places import ADAPTED, InputPlace, merge_files
from .plan.read_order import read_order
from .plan.recipe_text import RECIPE, check_files, check_inputs, recipe_text
from .remote.open_arrivals import arrivals_of
from .streaming.constant_tensors import constant_tensors
from .streaming.dense_stream import Output, Stream
from .streaming.failures import no_empty_parents, system_refusals
from .streaming.feeder import CUT, Feeder, job_length, longest_cut
from .streaming.gram_cache import Products
from .streaming.group_report import GroupReport, judge, mean_angle
from .streaming.input_digests import InputDigests
from .streaming.read_back import ReadBack
from .streaming.unmerged import carry
from .streaming.writer import Writer, copy_companions
from .tokenizers.chat_template import write_template
from .tokenizers.generation_config import write_asking
from .tokenizers.vocabulary import write_tokenizer

__all__ = ["MergeResult", "merge"]


Identified = tuple[str, Path, ModelIdentity]  # an input: role, directory, identity


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge.

    seconds  of reading, merging, writing and reading back, without flushing to disk and publication
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
    def summary(self) -> JsonObject:
        """The report of the first output."""
        return self.summary_of(0)

    def summary_of(self, output: int) -> JsonObject:
        """Return the report of one output, which its manifest records."""
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
            **({"towers": "; ".join(towers)} if (towers := tower_note(self.plan.models[0])) else {}),
            "notes": list(self.plan.notes),
            "warnings": list(self.warnings),
            "groups": rows,
        }


def merge(
    request: MergeRequest,
    *,
    out: Path,
    force: bool = False,
    verify: bool = True,
    progress: Progress = SILENT,
    cut: int | None = None,
    account: Account | None = None,
    shard_bytes: int | None = None,
) -> MergeResult:
    """Merge models into `out`, or with several etas into one directory per eta inside `out`.

    Each output is a model directory that appears complete or not at all. With `verify` it is read back from the disk
    before it appears; without, its manifest has no digests of the weights. `cut` is the number of elements per read, a
    multiple of 4096 (None: by the method); it does not change the result. `account` replaces entries of the manifest
    and the card for another command that merges. `shard_bytes` bounds each file of weights (None: 5 GB).
    Raises UsageError, InputError or OutputError, if possible before any work.
    """
    with system_refusals(out), arrivals_of(request.stream, progress.note) as arrivals:
        plan = plan_merge(request, out, force, arrivals=arrivals)
        for line in plan.notes:
            progress.note(line)
        for line in plan.warnings:
            progress.warn(line)
        return _merge(plan, force, verify, progress, cut, account, shard_bytes)


def _merge(
    plan: MergePlan,
    force: bool,
    verify: bool,
    progress: Progress,
    cut: int | None,
    account: Account | None,
    shard_bytes: int | None,
) -> MergeResult:
    started = now()
    with ExitStack() as stack:
        stack.enter_context(announced(progress.note))
        stack.enter_context(no_empty_parents(plan.outputs[0]))
        directories = [stack.enter_context(staged_output(path, force)) for path in plan.outputs]
        for directory in directories:
            copy_companions(plan.models[0].origin, directory, _config_changes(plan))
            if plan.vocabulary:
                write_tokenizer(plan.vocabulary, directory)
            if plan.template:
                write_template(plan.template, directory)
            write_asking(plan.asking, directory)
        arrives = plan.arrivals.pending
        if plan.request.recorded and not arrives:
            _check_recorded(plan)
        result, digests, weights = _stream(plan, directories, verify, progress, cut, shard_bytes)
        if plan.request.recorded and arrives:  # the digests are those of whole models
            _check_recorded(plan)
        parents = _identified(plan, weights)
        for number, directory in enumerate(directories):
            known = {file.name: digests[number].get(file.name) for file in weight_files(directory)}
            manifest = _manifest(result, number, parents, started, account)
            text = recipe_text(plan, number, manifest["parents"], directory)
            (directory / RECIPE).write_text(text, encoding="utf-8", errors="backslashreplace")
            write_card(directory, manifest, plan.outputs[number], account)
            write_manifest(directory, manifest, known)
    for line in result.warnings[len(plan.warnings) :]:  # those of the plan were shown before
        progress.warn(line)
    return result


def _check_recorded(plan: MergePlan) -> None:
    check_files(plan.request.recorded, merge_files(plan.request))
    found = [(role, path, one.weights, one.files) for role, path, one in _identified(plan, {})]
    check_inputs(plan.request.recorded, found)


def _config_changes(plan: MergePlan) -> JsonObject:
    """Return the keys of config.json that the merge changes, with their values."""
    return {**plan.config, **({"dtype": plan.request.dtype} if plan.request.dtype else {})}


def _stream(
    plan: MergePlan,
    directories: list[Path],
    verify: bool,
    progress: Progress,
    cut: int | None,
    shard_bytes: int | None,
) -> tuple[MergeResult, list[dict[str, str]], dict[Path, str]]:
    """Read, merge and write all weights; return the digests of the inputs' tensors, by directory.

    With `verify` also read the outputs back, and return the digest of each file.
    """
    begin = time.perf_counter()
    total = plan.input_bytes * plan.method.passes + (plan.output_bytes * len(directories) if verify else 0)
    with (
        ExitStack() as stack,
        Reader.open(plan.inputs, plan.arrivals) as reader,
        progress.task(f"merge {plan.request.method}", total=total, unit="bytes") as task,
    ):
        plan.arrivals.start(read_order(plan) if plan.arrivals.pending else ())
        for model in plan.inputs:
            check_copies(model, reader)
        writers = [stack.enter_context(Writer.create(directory, plan.layout, shard_bytes)) for directory in directories]
        followers = [stack.enter_context(ReadBack(directory, task)) for directory in directories if verify]
        for follower in followers:
            follower.start()
        output = Output(plan, writers, followers)
        inputs = InputDigests(() if plan.arrivals.pending else plan.inputs)
        groups = []
        for group, report in zip(plan.groups, _groups(plan, reader, output, task, inputs, cut), strict=True):
            groups.append(report)
            for name in group.tensors:
                output.wrote(name, plan.parts[name].sources[0].count)
        for name in carry(plan, reader, output):
            output.wrote(name, plan.models[0].tensors[name].count)
        plan.arrivals.finish()
        weights = inputs.finish(plan.request.threads)
        found = constant_tensors(plan, reader)
        checks = output.checks.sums
        digests = [follower.finish(plan.layout, sums) for follower, sums in zip(followers, checks, strict=False)]
    seconds = time.perf_counter() - begin
    warnings = (*plan.warnings, *found, *judge(plan.request.method, groups))
    return MergeResult(plan, tuple(groups), warnings, seconds), digests or [{} for _ in directories], weights


def _groups(
    plan: MergePlan, reader: Reader, output: Output, task: Task, inputs: InputDigests, cut: int | None
) -> Iterator[GroupReport]:
    """Merge group after group, with the stream for the method."""
    outputs = len(output.writers)
    length = cut or job_length(plan, outputs)
    if plan.method.selection is not None:
        from .streaming.sparse_stream import ChoosingStream  # its kernels are not loaded for scalar combinations

        by_rows = plan.method.selection.by == "rank"  # rows are not the pieces that are hashed
        feeder = Feeder(plan, reader, outputs, longest_cut(plan, length), None if by_rows else inputs)
        with inputs.read_ahead() if by_rows else nullcontext():
            yield from ChoosingStream(plan, feeder, output, task, plan.method.selection).run()
        return
    if plan.method.fused is not None:
        from .streaming.fused_stream import FusedStream

        by_rows = plan.method.fused.kind == "arcee"
        feeder = Feeder(plan, reader, outputs, longest_cut(plan, length), None if by_rows else inputs)
        with inputs.read_ahead() if by_rows else nullcontext():
            yield from FusedStream(plan, feeder, output, task, plan.method.fused).run()
        return
    if plan.method.elements is not None:
        from .streaming.element_stream import ElementStream

        feeder = Feeder(plan, reader, outputs, longest_cut(plan, cut or CUT))
        with inputs.read_ahead():
            yield from ElementStream(plan, feeder, output, task, plan.method.elements).run()
        return
    products = Products(plan)
    feeder = Feeder(plan, reader, outputs, length, inputs)
    yield from Stream(plan, feeder, output, task, products).run()
    plan.arrivals.finish()  # the sums are kept by the times and sizes of files that are whole
    products.save()


def _places_of(plan: MergePlan) -> list[InputPlace]:
    """Return role and directory of every input, in the order of the manifest (`places.merge_places`)."""
    # "input", not "model": the role distinguishes the init of a trained policy from the inputs of a merge.
    found: list[InputPlace] = []
    for model in plan.inputs:
        found.append(("base" if model is plan.base else "input", model.path))
        if model.origin != model.path:
            found.append((ADAPTED, model.origin))
    return found


def _identified(plan: MergePlan, weights: Mapping[Path, str]) -> list[Identified]:
    """Return role, directory and identity of every input; digests are remembered from one call to the next."""
    return [(role, path, identity_of(path, plan.request.threads, weights.get(path))) for role, path in _places_of(plan)]


def _manifest(
    result: MergeResult, number: int, parents: Sequence[Identified], started: str, account: Account | None
) -> Manifest:
    """Return `gemma2.json` of one output: request, parents with their roles in the merge, and the report."""
    plan = result.plan
    return {
        "command": f"merge {plan.request.method}",
        "config": _recorded(plan, number),
        "parents": [parent_record(role, path, found, plan.outputs[number]) for role, path, found in parents],
        "data": _files(plan, plan.outputs[number]),
        "versions": versions(),
        "started": started,
        "ended": now(),
        "status": "complete",
        "summary": result.summary_of(number),
        **(_replaced(account) if account else {}),
    }


def _files(plan: MergePlan, out: Path) -> list[DataRecord]:
    """Return the records of the files that the request names, for the manifest of `out`."""
    return [
        {"role": option, "path": os.path.relpath(path.resolve(), out.resolve()), "digest": digest_input(path)}
        for option, path in merge_files(plan.request)
    ]


def _recorded(plan: MergePlan, number: int) -> JsonObject:
    """Return the options of one output as its manifest records them: models by their roles."""
    options = plan.request.options()
    choice = plan.vocabulary.choice if plan.vocabulary else None
    rows = {"vocabulary": asdict(choice)} if choice else {}
    return {**options, "etas": options.get("etas", [])[number : number + 1], **rows}


def _replaced(account: Account) -> Manifest:
    """Return the entries of the manifest that another command replaces."""
    return {
        "command": account.command,
        "config": dict(account.config),
        "data": list(account.data),
        "summary": dict(account.summary),
    }
