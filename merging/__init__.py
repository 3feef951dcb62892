"""Merge arithmetic over safetensors: plan, stream, report. numpy, numba and safetensors files; no torch.

from pathlib import Path
from gemma2.merging import MergeRequest, merge

request = MergeRequest(method="slerp", models=(Path("rl-1"), Path("rl-2")), base=Path("sft"))
merge(request, out=Path("merged"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coefficients import (
        ema_coefficients,
        linear_coefficients,
        liti_coefficients,
        slerp_coefficients,
        warp_coefficients,
    )
    from .difference import diff_models
    from .engine import MergeResult, merge
    from .inspection import inspect_model
    from .plan import MergePlan, plan_merge
    from .request import MergeRequest

# Resolved on first use: errors and outputs are imported at command line start-up, where numba must not be.
_HOMES = {
    "MergePlan": "plan",
    "MergeRequest": "request",
    "MergeResult": "engine",
    "diff_models": "difference",
    "ema_coefficients": "coefficients",
    "inspect_model": "inspection",
    "linear_coefficients": "coefficients",
    "liti_coefficients": "coefficients",
    "merge": "engine",
    "plan_merge": "plan",
    "slerp_coefficients": "coefficients",
    "warp_coefficients": "coefficients",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
