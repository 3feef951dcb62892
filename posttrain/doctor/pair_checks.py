"""Two models: whether they can be merged, and whether one can teach the other, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2.core.errors import InputError
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.outputs.tokenizer_ids import tokenizer_difference
from gemma2.merging.inputs.config_keys import config_differences
from gemma2.merging.inputs.weight_files import find_weights

from .checks.finding import Depth, Diagnosis, fine, problem, warning
from .checks.subject import ADAPTER, OUTPUT, REWARD, Subject

__all__ = ["PAIR_CHECKS", "check_pair"]

PAIR_CHECKS = {
    "mergeable": "two models: can be merged, yes or no, and why",
    "teachable": "two models: the first can teach the second (distill), and why not",
    "same-weights": "two models: whether they hold the same weights",
}


def check_pair(name: str, first: Subject, other: Subject, depth: Depth) -> Iterator[Diagnosis]:
    """The answers of one check of a pair."""
    if name == "mergeable":
        yield from _mergeable(first, other)
    elif name == "teachable":
        yield from _teachable(first, other)
    elif depth >= Depth.FULL:
        yield from _same_weights(first, other)


def _mergeable(first: Subject, other: Subject) -> Iterator[Diagnosis]:
    reason, fix = _against_merging(first, other)
    if reason:
        yield problem(f"can be merged: no, {reason}", fix)
        return
    stored = [{tensor.dtype for tensor in one.tensors.values()} for one in (first, other)]
    if stored[0] != stored[1]:
        left, right = (", ".join(sorted(dtypes)) for dtypes in stored)
        yield warning(
            f"can be merged: yes; dtypes differ ({left} and {right})", "state the output's with merge --dtype"
        )
    elif _templates(first) != _templates(other):
        yield warning("can be merged: yes; chat templates differ", "state which with merge --chat-template")
    else:
        yield fine("can be merged: yes")


def _templates(subject: Subject) -> str | None:
    return subject.tokenizer.chat_template if subject.has_tokenizer and subject.tokenizer is not None else None


def _against_merging(first: Subject, other: Subject) -> tuple[str, str]:
    for one in (first, other):
        if one.kind in (ADAPTER, OUTPUT):
            return f"{one} is {'an adapter' if one.kind == ADAPTER else 'not a model'}", "name BASE+ADAPTER, or a model"
        try:
            find_weights(one.path, "model")
        except InputError as error:
            return error.what, error.hint
        if one.header_faults:
            return one.header_faults[0], "fetch the weights again"
    if first.architecture != other.architecture:
        return (
            f"one is {printable(first.architecture)}, one {printable(other.architecture)}",
            "merge models of one kind",
        )
    for found in config_differences(first.config, other.config, ()):
        text = f"{printable(found.key)} is {printable(str(found.left))} and {printable(str(found.right))}"
        return (
            text,
            f"merge models of one architecture, or keep the first's: merge --allow-config {printable(found.key)}",
        )
    names = sorted(first.tensors.keys() ^ other.tensors.keys())
    if names:
        return f"only one has {printable(names[0])}", "merge models of one architecture"
    for name, tensor in first.tensors.items():
        if tensor.shape != other.tensors[name].shape:
            shapes = f"{list(tensor.shape)} and {list(other.tensors[name].shape)}"
            return f"{printable(name)} is {shapes}", "merge models of one architecture and one vocabulary"
    difference = tokenizer_difference(first.path, other.path)
    if difference:
        return f"their tokenizers differ: {difference}", "choose one with merge --tokenizer"
    return "", ""


def _teachable(first: Subject, other: Subject) -> Iterator[Diagnosis]:
    """Distillation compares distributions over tokens, so every token needs the same id in both (GKD, 2306.13649)."""
    for one in (first, other):
        if one.kind != "policy":
            yield problem(f"can teach: no, {one} is not a language model", "give two language models")
            return
    rows = [one.number("vocab_size") for one in (first, other)]
    difference = tokenizer_difference(first.path, other.path)
    if difference or rows[0] != rows[1]:
        why = f"their tokenizers differ: {difference}" if difference else f"vocabularies of {rows[0]} and {rows[1]}"
        yield problem(f"can teach: no, {why}", "use models of one family, or train on its answers: generate, then sft")
    elif _templates(first) != _templates(other):
        yield problem("can teach: no, their chat templates differ", "copy the teacher's template to the student")
    else:
        yield fine("can teach: yes")


def _same_weights(first: Subject, other: Subject) -> Iterator[Diagnosis]:
    if REWARD in (first.kind, other.kind) and first.kind != other.kind:
        return
    if not first.tensors or first.tensors.keys() != other.tensors.keys() or first.header_faults or other.header_faults:
        return
    try:
        same = digest_weights(first.path) == digest_weights(other.path)
    except InputError:
        return
    if same:
        yield warning("both hold the same weights: a merge of them is the same model again", "check the paths")
    else:
        yield fine("different weights")
