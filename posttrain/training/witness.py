"""An evaluation runs the network that is trained, with its adapters on: seen by a hook, at no cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from gemma2.core.errors import GuardStop
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import Network

__all__ = ["measuring"]


@contextmanager
def measuring(model: Network, what: str, ranks: Ranks = ALONE) -> Iterator[None]:
    """Raise GuardStop at the end if `model` did not run while the context was open, or ran without its adapters.

    Of several processes some may have no rows to run it on; they end together.
    """
    ran: list[bool] = []

    def see(module: nn.Module, inputs: object) -> None:
        ran.append(not any(getattr(part, "disable_adapters", None) is True for part in module.modules()))

    hook = cast(nn.Module, plain_model(model).base_model).register_forward_pre_hook(see)
    try:
        yield
    finally:
        hook.remove()
    ran = [with_adapters for part in ranks.gather(ran) for with_adapters in part]
    if not ran or not all(ran):
        found = "without its adapters" if ran else "on another model than the one that is trained"
        raise GuardStop(f"{what} was measured {found}", "report it")
