"""An evaluation runs the network that is trained, with its adapters on: seen by a hook, at no cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from gemma2.core.errors import GuardStop
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import Network

__all__ = ["measuring"]


@contextmanager
def measuring(model: Network, what: str) -> Iterator[None]:
    """Raise GuardStop at the end if `model` did not run while the context was open, or ran without its adapters."""
    ran: list[bool] = []

    def see(module: nn.Module, inputs: object) -> None:
        ran.append(not any(getattr(part, "disable_adapters", None) is True for part in module.modules()))

    hook = cast(nn.Module, plain_model(model).base_model).register_forward_pre_hook(see)
    try:
        yield
    finally:
        hook.remove()
    if not ran or not all(ran):
        found = "without its adapters" if ran else "on another model than the one that is trained"
        raise GuardStop(f"{what} was measured {found}", "report it; the last checkpoint is kept")
