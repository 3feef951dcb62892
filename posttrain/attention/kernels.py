"""Which attention kernels a model and a device can have: names, packages, devices. No kernel is run here.

eager               all scores in memory: T^2 per head and row; any model, any device
sdpa                torch's scaled dot-product attention, which has no soft cap: refused for models that have one
flex_attention      torch's compiled kernel with soft cap and window; no backward pass on a CPU
flash_attention_2   soft cap and window, half precision only; package flash-attn
flash_attention_3   the same for Hopper; package flash-attn-3
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from gemma2.core.errors import UsageError

__all__ = ["DEVICES", "installed_kernels", "is_half_only", "refuse_kernel"]

FLASH = ("cuda", "xpu")
DEVICES = {"flex_attention": ("cuda", "xpu", "hpu"), "flash_attention_2": FLASH, "flash_attention_3": FLASH}
PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}
FOUND = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
CAP = "attn_logit_softcapping"


def is_half_only(kernel: str) -> bool:
    """Whether a kernel computes in bf16 or fp16 only."""
    return kernel.startswith("flash")


def installed_kernels(device: torch.device) -> list[str]:
    """The kernels besides eager and sdpa that a device can have and that are installed."""
    return [name for name, kinds in DEVICES.items() if device.type in kinds and (name not in FOUND or FOUND[name]())]


def refuse_kernel(
    kernel: str, settings: Mapping[str, object], device: torch.device, *, learns: bool, wide: str = ""
) -> None:
    """Raise UsageError for a kernel that a model's settings, this device or this installation rule out.

    learns  whether the model is trained
    wide    how to change that something of it computes in fp32 and not under autocast; "" if nothing does
    """
    if kernel == "eager":
        return
    if kernel in DEVICES and device.type == "cpu":
        raise UsageError(f"--attention {kernel} needs an accelerator, and none was found", "use --attention eager")
    if kernel in DEVICES and device.type not in DEVICES[kernel]:
        raise UsageError(f"--attention {kernel} does not run on {device.type}", "use --attention eager")
    if kernel in FOUND and not FOUND[kernel]():
        package = PACKAGES[kernel]
        raise UsageError(
            f"--attention {kernel} needs the package {package}", f"pip install {package}, or use --attention eager"
        )
    if kernel == "sdpa" and settings.get(CAP) is not None:
        raise UsageError(
            f"--attention sdpa has no soft cap, and this model's attention has one ({CAP} {settings[CAP]})",
            "use --attention eager, or flex_attention on an accelerator",
        )
    if kernel == "flex_attention" and learns and settings.get("attention_dropout"):
        raise UsageError("--attention flex_attention has no dropout, and config.json asks for it", "use eager")
    if is_half_only(kernel) and wide:
        raise UsageError(f"--attention {kernel} computes in half precision only", f"{wide}, or use --attention eager")
