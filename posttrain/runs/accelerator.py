"""Device, precision and versions of the accelerator stack of a run, for its manifest.

torch is asked where a command that runs models has loaded it; any other command has none of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.fields import PrecisionFields, TrainingFields

__all__ = ["accelerator_stack", "precision_of"]

WIDE, NARROW = "float32", "bfloat16"
LACKING = ("mps",)  # not used, as `default_device` says


def _accelerator() -> str | None:
    """The type of the accelerator that models of this process are on; None for a CPU, or without torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return None
    kind = str(torch.accelerator.current_accelerator().type)
    return None if kind in LACKING else kind


def accelerator_stack(config: Config) -> JsonObject:
    """Name of the device and, of an accelerator, versions of what is below torch, as far as torch says them."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(config, PrecisionFields | TrainingFields):
        return {}
    kind = _accelerator()
    if kind is None:
        return {"device": "cpu"}
    backend = getattr(torch, kind, None)

    def driver() -> object:
        if kind == "xpu":
            return backend.get_device_properties().driver_version  # type: ignore[union-attr]
        return torch._C._cuda_getDriverVersion()  # of CUDA: 12080 is 12.8

    asked: dict[str, Callable[[], object]] = {
        "device": lambda: backend.get_device_name(),  # type: ignore[union-attr]
        "devices": lambda: torch.accelerator.device_count(),
        "cuda": lambda: torch.version.cuda,
        "hip": lambda: torch.version.hip,
        "xpu": lambda: torch.version.xpu,
        "cudnn": lambda: torch.backends.cudnn.version() if kind == "cuda" else None,
        "nccl": lambda: ".".join(map(str, torch.cuda.nccl.version())) if kind == "cuda" else None,
        "driver": driver,
    }
    found: JsonObject = {"device": kind}
    for name, ask in asked.items():
        with suppress(AttributeError, RuntimeError, AssertionError, TypeError):  # a build of torch without that part
            value = ask()
            if value is not None:
                found[name] = value
    return found


def precision_of(config: Config) -> JsonObject:
    """The dtypes in which a command computes (`models/precision.py` states the rules); empty without torch.

    trained   weights, gradients and moments         products  of the trained network, by autocast
    frozen    models that are not trained            heads     logits, log-probs and the KL
    """
    if "torch" not in sys.modules or not isinstance(config, PrecisionFields | TrainingFields):
        return {}
    narrow = NARROW if _accelerator() is not None else WIDE
    found: JsonObject = {}
    if isinstance(config, TrainingFields):
        found |= {"trained": WIDE, "products": narrow if config.trainer.get("bf16", True) else WIDE}
    if isinstance(config, PrecisionFields):
        found["frozen"] = narrow if config.dtype == "auto" else config.dtype
    return found | {"heads": WIDE}
