"""Text generation back ends behind one interface, `base.Engine`; each is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2.core.progress import Progress
from gemma2.core.ranks import ALONE, Ranks

from .base import Completion, Engine, Request

if TYPE_CHECKING:
    from gemma2.posttrain.schemas import GenerateConfig

__all__ = ["Completion", "Engine", "Request", "load_engine"]


def load_engine(config: GenerateConfig, progress: Progress, ranks: Ranks = ALONE) -> Engine:
    """The engine that `config.engine` names, ready to answer. ranks: the processes that share the work of our sampler.

    Raises UsageError when its package is missing, InputError when the model cannot be loaded.
    """
    if config.engine == "openai":
        from .server import ServerEngine

        return ServerEngine(config, progress)
    if config.engine == "vllm":
        from .offline import VllmEngine

        return VllmEngine.load(config)
    from .local import SamplerEngine

    return SamplerEngine.load_for(config, ranks)
