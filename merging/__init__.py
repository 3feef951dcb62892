"""Merge arithmetic over safetensors: plan, stream, report. numpy, numba and safetensors files; no torch.

from pathlib import Path
from gemma2.merging import MergeRequest, merge

request = MergeRequest(method="slerp", models=(Path("rl-1"), Path("rl-2")), base=Path("sft"))
merge(request, out=Path("merged"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import MergeResult, merge
    from .inspect.difference import diff_models
    from .inspect.inspection import inspect_model
    from .methods.coefficients import (
        ema_coefficients,
        linear_coefficients,
        liti_coefficients,
        slerp_coefficients,
        warp_coefficients,
    )
    from .methods.request import MergeRequest
    from .plan.merge_plan import MergePlan, plan_merge

# Resolved on first use: the command line imports this package at its start, and numba must not be loaded there.
_HOMES = {
    "MergePlan": "plan.merge_plan",
    "MergeRequest": "methods.request",
    "MergeResult": "engine",
    "diff_models": "inspect.difference",
    "ema_coefficients": "methods.coefficients",
    "inspect_model": "inspect.inspection",
    "linear_coefficients": "methods.coefficients",
    "liti_coefficients": "methods.coefficients",
    "merge": "engine",
    "plan_merge": "plan.merge_plan",
    "slerp_coefficients": "methods.coefficients",
    "warp_coefficients": "methods.coefficients",
}

__all__ = [
    "MergePlan",
    "MergeRequest",
    "MergeResult",
    "diff_models",
    "ema_coefficients",
    "inspect_model",
    "linear_coefficients",
    "liti_coefficients",
    "merge",
    "plan_merge",
    "slerp_coefficients",
    "warp_coefficients",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
