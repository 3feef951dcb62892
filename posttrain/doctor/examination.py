"""Runs the checks on the machine, on each model, and on each pair of models; the order of the answers is fixed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import import_module
from itertools import combinations
from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.hub import fetch_snapshot, is_hub_id, locate_model

from .checks import adapter_checks, config_checks, output_checks, reward_model_checks, stop_checks, weight_file_checks
from .checks.finding import Check, Depth, Diagnosis, Finding
from .checks.subject import POLICY, REWARD, Subject
from .machine_checks import MACHINE_CHECKS
from .pair_checks import PAIR_CHECKS, check_pair

__all__ = ["MODEL_CHECKS", "check_names", "examine", "plan_examination"]

MACHINE = "machine"
READS = {
    Depth.QUICK: "headers and JSON files",
    Depth.FULL: "whole files",
    Depth.DEEP: "whole files, and runs the model",
}


def _later(module: str, function: str) -> Callable[[Subject], Iterator[Diagnosis]]:
    """A check whose module is imported when it runs: --quick imports neither torch, transformers nor numpy."""

    def run(subject: Subject) -> Iterator[Diagnosis]:
        check: Callable[[Subject], Iterator[Diagnosis]] = getattr(
            import_module(f"gemma2.posttrain.doctor.checks.{module}"), function
        )
        yield from check(subject)

    return run


MODELS = frozenset({POLICY, REWARD})
TOKENIZER = "tokenizer_checks"
MODEL_CHECKS: tuple[Check, ...] = (
    *config_checks.CHECKS,
    *weight_file_checks.CHECKS,
    Check(
        "values",
        "NaN and infinity with their place; tensors of zeros or of one value",
        Depth.FULL,
        MODELS | {"adapter"},
        _later("weight_value_checks", "check_values"),
    ),
    Check("tokenizer", "the tokenizer's files load", Depth.FULL, MODELS, _later(TOKENIZER, "loads")),
    Check(
        "token-ids",
        "ids of special tokens: Gemma 2's, the same everywhere",
        Depth.FULL,
        MODELS,
        _later(TOKENIZER, "ids"),
    ),
    Check("pad", "padding exists and is not the end token", Depth.FULL, MODELS, _later(TOKENIZER, "pad")),
    Check("token-rows", "every token has a row in the embedding", Depth.FULL, MODELS, _later(TOKENIZER, "rows")),
    Check("bos", "one <bos> for a text, and for a chat", Depth.FULL, MODELS, _later(TOKENIZER, "bos"), gemma2=True),
    Check("template", "1, 2, 3 turns, byte for byte as trained", Depth.FULL, MODELS, _later(TOKENIZER, "template")),
    Check("system", "a system text is used or refused, not dropped", Depth.FULL, MODELS, _later(TOKENIZER, "system")),
    Check("max-length", "model_max_length covers the context", Depth.FULL, MODELS, _later(TOKENIZER, "max_length")),
    *stop_checks.CHECKS,
    Check(
        "attention",
        "attention back ends against eager, with logits over the soft cap and beyond the window",
        Depth.FULL,
        MODELS,
        _later("attention_probe", "probe_attention"),
        gemma2=True,
    ),
    *reward_model_checks.CHECKS,
    Check(
        "loss",
        "loss on plain sentences; whether its answers end",
        Depth.DEEP,
        frozenset({POLICY}),
        _later("meaning_checks", "loss"),
    ),
    Check(
        "scores",
        "a reward model's scores: not constant, independent of batch and padding",
        Depth.DEEP,
        frozenset({REWARD}),
        _later("meaning_checks", "scores"),
    ),
    *adapter_checks.CHECKS,
    *output_checks.CHECKS,
)


def check_names() -> dict[str, str]:
    """Name -> what it looks at, of every check."""
    machine = {name: f"this machine: {line}" for name, (line, _, _) in MACHINE_CHECKS.items()}
    return machine | {check.name: check.line for check in MODEL_CHECKS} | PAIR_CHECKS


def examine(
    paths: Sequence[Path], depth: Depth = Depth.FULL, only: Collection[str] = (), skip: Collection[str] = ()
) -> Iterator[Finding]:
    """Yield the findings of every check that applies.

    paths       models, adapters or outputs, as directories or hub ids; none: the machine
    depth       how far to read
    only, skip  names of checks
    Raises UsageError for an unknown name, InputError for a path that is not a directory.
    """
    wanted = _chosen(only, skip)
    if not paths:
        for name, (_, least, run) in MACHINE_CHECKS.items():
            if wanted(name) and least <= depth:
                yield from _named(name, MACHINE, run(Path.cwd()))
        return
    subjects = [Subject(_directory(path)) for path in paths]
    for subject in subjects:
        yield from _of_model(subject, depth, wanted)
    for first, other in combinations(subjects, 2):
        for name in PAIR_CHECKS:
            if wanted(name):
                yield from _named(name, f"{first} and {other}", check_pair(name, first, other, depth))


def plan_examination(
    paths: Sequence[Path], depth: Depth = Depth.FULL, only: Collection[str] = (), skip: Collection[str] = ()
) -> list[dict[str, str]]:
    """The checks that `examine` would make, in its order: subject, check, and what it reads. Raises like it."""
    wanted = _chosen(only, skip)
    if not paths:
        return [
            {"subject": MACHINE, "check": name, "reads": READS[least]}
            for name, (_, least, _) in MACHINE_CHECKS.items()
            if wanted(name) and least <= depth
        ]
    subjects = [Subject(_directory(path, weights=False)) for path in paths]
    rows = [
        {"subject": str(subject), "check": check.name, "reads": READS[check.depth]}
        for subject in subjects
        for check in MODEL_CHECKS
        if _applies(check, subject) and check.depth <= depth and wanted(check.name)
    ]
    pairs = [f"{first} and {other}" for first, other in combinations(subjects, 2)]
    return rows + [
        {"subject": pair, "check": name, "reads": READS[depth]}
        for pair in pairs
        for name in PAIR_CHECKS
        if wanted(name)
    ]


def _chosen(only: Collection[str], skip: Collection[str]) -> Callable[[str], bool]:
    for name in (*only, *skip):
        if name not in check_names():
            raise UsageError(f"unknown check '{name}'", _closest(name))
    return lambda name: (not only or name in only) and name not in skip


def _applies(check: Check, subject: Subject) -> bool:
    return subject.kind in check.applies and (subject.is_gemma2 or not check.gemma2)


def _directory(path: Path, weights: bool = True) -> Path:
    """The directory of a model; of a hub id, on demand without its weights."""
    by_id = is_hub_id(path) and not weights
    found = fetch_snapshot(str(path), "model", weights=False) if by_id else locate_model(path, "model")
    if not found.is_dir():
        what = "is a file" if found.exists() else "does not exist"
        raise InputError(f"{path} {what}", "give a model directory, an adapter, an output or a hub id")
    if not any(found.iterdir()):
        raise InputError(f"{path} is empty", "give a model directory, an adapter, an output or a hub id")
    return found


def _of_model(subject: Subject, depth: Depth, wanted: Callable[[str], bool]) -> Iterator[Finding]:
    for check in MODEL_CHECKS:
        if _applies(check, subject) and check.depth <= depth and wanted(check.name):
            found = list(_named(check.name, str(subject), check.run(subject)))
            yield from found
            if check.name in ("headers", "config") and any(one.status == "problem" for one in found):
                return  # what follows reads what is broken


def _named(name: str, subject: str, answers: Iterator[Diagnosis]) -> Iterator[Finding]:
    for one in answers:
        yield Finding(name, subject, one.status, one.message, one.fix)


def _closest(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, check_names(), 1)
    return f"did you mean '{near[0]}'? gemma2 doctor --list names all" if near else "gemma2 doctor --list names all"
