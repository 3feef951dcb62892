"""The attention kernel of a command: what was asked for runs or is refused, what `auto` took is said.

`auto` is eager on a CPU. On an accelerator it is flex_attention if `kernel_check.py` finds it right there, else eager,
with a warning that has the figures. Several processes decide together: all are eager if one of them has to be. A
decision is made once for an architecture in a process: every model of a command that has it gets the same kernel. The
sampler's masks suit eager and sdpa alone: with another kernel it draws in eager attention, and what it drew is scored
by the kernel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject, read_json
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.schemas.fields import Attention

from .kernel_check import KernelCheck, Precision, check_kernel
from .kernels import is_half_only, refuse_kernel
from .probe_network import KEPT

__all__ = ["KernelChoice", "chosen_kernel", "drawing_kernel", "kernels_in", "settle_attention"]

AUTO = "flex_attention"
SHAPED_BY: tuple[str, ...] = (
    *KEPT,
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "sliding_window"),
    *("use_sliding_window", "layer_types", "attention_dropout"),
)


@dataclass(frozen=True)
class KernelUse:
    """How models are computed with: `dtype` of their weights; learns: under autocast; packed: rows are joined.

    wide  how to change that something computes in fp32 and not under autocast; "" if nothing does
    """

    dtype: torch.dtype
    device: torch.device
    learns: bool = False
    packed: bool = False
    wide: str = ""

    def precisions(self, kernel: str) -> list[Precision]:
        """The precisions in which the kernel will run."""
        if self.dtype != torch.float32:
            return ["bfloat16"]
        if is_half_only(kernel):
            return ["autocast"]
        return ["autocast", "float32"] if self.learns and self.device.type != "cpu" else ["float32"]


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, how it was checked, and why it is not the first choice of `auto`."""

    kernel: str
    checks: tuple[KernelCheck, ...] = ()
    reason: str = ""

    def record(self) -> JsonObject:
        """For a manifest."""
        found: JsonObject = {"kernel": self.kernel}
        if self.checks:
            found["checks"] = [check.record() for check in self.checks]
        return found | ({"reason": self.reason} if self.reason else {})


_choices: dict[tuple[str, str, str], KernelChoice] = {}


def settle_attention(
    asked: Attention,
    models: Sequence[Path],
    progress: Progress = SILENT,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    learns: bool = False,
    packed: bool = False,
    wide: str | None = None,
) -> JsonObject:
    """Decide on the kernel of a command's models before they are loaded, say it, and return the record of it.

    dtype   of the weights; a model that learns has fp32 weights and runs under autocast on an accelerator
    learns  whether gradients are compared as well
    packed  whether rows are joined
    wide    how to change that some of its models compute in fp32 and not under autocast, for the error of a kernel that
            cannot; None: by `dtype` and `learns`, and `--dtype` changes it
    Processes that have met decide together: each of them has to call this. Raises UsageError for a kernel that was
    asked for and does not fit, or computes something else.
    """
    use = KernelUse(dtype, device, learns, packed, _wide(dtype, learns) if wide is None else wide)
    found: dict[str, JsonObject] = {}
    said: set[str] = set()
    for path, choice in _on_all(asked, list(dict.fromkeys(models)), use).items():
        found[str(path)] = choice.record()
        line = choice.reason or f"attention: {choice.kernel}, {'; '.join(one.figures() for one in choice.checks)}"
        if line not in said and choice.reason:
            progress.warn(line)
        elif line not in said and choice.checks:
            progress.note(line)
        said.add(line)
        if packed and choice.kernel == "eager":
            raise UsageError("packing with eager attention would hold all scores of the joined rows", "drop --packing")
    return {"asked": asked, "models": found}


def kernels_in(settled: JsonObject) -> str:
    """The kernels of a record of `settle_attention`, for a result that people read."""
    return ", ".join(sorted({one["kernel"] for one in settled["models"].values()}))


def chosen_kernel(asked: Attention, path: Path, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that a model is loaded with: the one that was settled on, else decided now for reading alone."""
    return _choice(asked, path, KernelUse(dtype, device, wide=_wide(dtype))).kernel


def drawing_kernel(asked: Attention) -> Attention:
    """The kernel of a model that only draws: its masks suit eager and sdpa."""
    return "sdpa" if asked == "sdpa" else "eager"


def _wide(dtype: torch.dtype, learns: bool = False) -> str:
    return "give --dtype bfloat16" if dtype == torch.float32 and not learns else ""


def _on_all(asked: Attention, models: Sequence[Path], use: KernelUse) -> dict[Path, KernelChoice]:
    """The choice for each model, the same in all processes: eager for all where `auto` is eager in one of them."""
    choices = {path: _choice(asked, path, use) for path in models}
    ranks = _met()
    if asked != "auto" or use.device.type == "cpu" or ranks.size == 1:
        return choices
    every = ranks.gather([(choice.kernel, choice.reason) for choice in choices.values()])
    for number, path in enumerate(models):
        kernels = [of_rank[number] for of_rank in every]
        if len({kernel for kernel, _ in kernels}) > 1:
            rank, reason = next((rank, why) for rank, (kernel, why) in enumerate(kernels) if kernel == "eager")
            choices[path] = replace(choices[path], kernel="eager", reason=f"{reason} (rank {rank}, so on all)")
            _choices[_key(asked, read_json(path / "config.json"), use.device)] = choices[path]
    return choices


def _met() -> Ranks:
    """The processes of this job, if they have met."""
    group = torch.distributed
    if not group.is_available() or not group.is_initialized():
        return ALONE
    return Ranks(group.get_rank(), group.get_world_size())


def _key(asked: Attention, settings: Mapping[str, object], device: torch.device) -> tuple[str, str, str]:
    return json.dumps([settings.get(name) for name in SHAPED_BY]), asked, device.type


def _choice(asked: Attention, path: Path, use: KernelUse) -> KernelChoice:
    if asked == "eager" or (asked == "auto" and use.device.type == "cpu"):
        return KernelChoice("eager")
    settings = read_json(path / "config.json")
    key = _key(asked, settings, use.device)
    if key not in _choices:
        _choices[key] = _automatic(settings, use) if asked == "auto" else _explicit(asked, settings, use)
    return _choices[key]


def _explicit(kernel: str, settings: Mapping[str, object], use: KernelUse) -> KernelChoice:
    refuse_kernel(kernel, settings, use.device, learns=use.learns, wide=use.wide)
    try:
        checks = _checked(kernel, settings, use)
    except Exception as error:  # a kernel raises whatever its compiler raises
        detail = " ".join(str(error).split())[:200]
        raise UsageError(f"--attention {kernel} cannot run here: {detail}", "use --attention eager") from error
    for check in checks:
        if not check.right:
            raise UsageError(
                f"--attention {kernel} computes other attention than this model's: it is {check.figures()}",
                "use --attention eager, or another version of torch and transformers",
            )
    return KernelChoice(kernel, tuple(checks))


def _automatic(settings: Mapping[str, object], use: KernelUse) -> KernelChoice:
    try:
        refuse_kernel(AUTO, settings, use.device, learns=use.learns)
        checks = _checked(AUTO, settings, use)
    except UsageError as error:
        return KernelChoice("eager", reason=f"attention: eager; {error}".partition("; use ")[0])
    except Exception as error:  # a kernel raises whatever its compiler raises; eager attention runs, and this is said
        detail = " ".join(str(error).split())[:200]
        return KernelChoice("eager", reason=f"attention: eager; {AUTO} cannot run here: {detail}")
    wrong = next((check for check in checks if not check.right), None)
    if wrong is not None:
        return KernelChoice("eager", tuple(checks), f"attention: eager; {AUTO} is {wrong.figures()}")
    return KernelChoice(AUTO, tuple(checks))


def _checked(kernel: str, settings: Mapping[str, object], use: KernelUse) -> list[KernelCheck]:
    """Compare with eager in each precision; gradients in the one that trains, in each where that may be fp32."""
    return [
        check_kernel(settings, kernel, precision, use.device, learns=learns, packed=use.packed)
        for number, precision in enumerate(use.precisions(kernel))
        for learns in [use.learns and (number == 0 or bool(use.wide))]
    ]
