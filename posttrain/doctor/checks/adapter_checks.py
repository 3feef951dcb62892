"""A LoRA adapter: whether its base is there, and whether rank, shapes and task fit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma2.core.outputs.safetensors_header import printable

from .finding import Check, Depth, Diagnosis, fine, problem, warning
from .subject import ADAPTER, Subject

__all__ = ["CHECKS"]

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
TASKS = ("CAUSAL_LM", "SEQ_CLS")


def base_of(subject: Subject) -> Subject | None:
    """The model that the adapter records, where it is on disk."""
    recorded = subject.json("adapter_config.json").get("base_model_name_or_path")
    places = [Path(recorded), subject.path / recorded] if isinstance(recorded, str) and recorded else []
    return next((Subject(place) for place in places if (place / "config.json").is_file()), None)


def _adapter(subject: Subject) -> Iterator[Diagnosis]:
    if fault := subject.fault("adapter_config.json"):
        yield problem(fault, "save the adapter again")
        return
    settings = subject.json("adapter_config.json")
    if settings.get("peft_type") != "LORA":
        kind = printable(str(settings.get("peft_type")))
        yield problem(f"peft_type is {kind}: only LoRA is read", "use a LoRA adapter")
    elif settings.get("task_type") not in TASKS:
        task = printable(str(settings.get("task_type")))
        yield warning(f"task_type is {task}", f"set task_type to {TASKS[0]}, or {TASKS[1]} for a reward model")
    else:
        yield fine(f"LoRA of rank {settings.get('r')}, {settings['task_type']}")


def _base(subject: Subject) -> Iterator[Diagnosis]:
    """The base is there, and every pair of factors fits a tensor of it."""
    recorded = printable(str(subject.json("adapter_config.json").get("base_model_name_or_path")))
    base = base_of(subject)
    if base is None:
        yield warning(
            f"its base {recorded} is not on this disk", f"fetch it: hf download {recorded}, or name it: BASE+ADAPTER"
        )
        return
    wrong = [line for name in subject.tensors if name.endswith(A) and (line := _misfit(subject, base, name))]
    if wrong:
        yield problem(
            f"{wrong[0]}{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}",
            "use the base that it was trained on",
        )
    else:
        yield fine(f"fits {base}")


def _misfit(subject: Subject, base: Subject, name: str) -> str:
    """What does not fit of one pair of factors, or ""."""
    stem = name.removesuffix(A)
    down, up = subject.tensors[name], subject.tensors.get(stem + B)
    target = base.tensors.get(stem.removeprefix(PREFIX) + ".weight")
    shown = printable(stem.removeprefix(PREFIX))
    if up is None:
        return f"{shown} has lora_A without lora_B"
    if target is None:
        return f"the base has no {shown}"
    fits = len(down.shape) == len(up.shape) == len(target.shape) == 2 and down.shape[0] == up.shape[1]
    if not fits or (up.shape[0], down.shape[1]) != target.shape:
        return f"{shown}: factors {list(up.shape)} and {list(down.shape)} for a tensor {list(target.shape)}"
    return ""


CHECKS = (
    Check("adapter", "adapter_config.json: LoRA, its task", Depth.QUICK, frozenset({ADAPTER}), _adapter),
    Check("base", "the base of an adapter is there, ranks and shapes fit it", Depth.QUICK, frozenset({ADAPTER}), _base),
)
