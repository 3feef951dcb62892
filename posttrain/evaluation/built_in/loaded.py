"""The models of a measure, loaded one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gemma2.core.progress import Progress
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.evaluation.suite.suite_plan import refuse_broken
from gemma2.posttrain.models.loading import default_device, load_policy
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.provenance.named_inputs import holds_results
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas.fields import Attention, Dtype

__all__ = ["context_of", "loaded", "models_of", "settle_kernel"]


class TwoModels(Protocol):
    """A configuration with a model and perhaps a second one."""

    @property
    def model(self) -> Path: ...

    @property
    def against(self) -> Path | None: ...

    @property
    def doctor(self) -> bool: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def attention(self) -> Attention: ...


def models_of(config: TwoModels) -> Sequence[Path]:
    """The models to measure, the one that the command is about first. Raises InputError for a broken one."""
    other = config.against
    found = [config.model] if other is None or holds_results(other) else [config.model, other]
    if config.doctor:
        for path in found:
            refuse_broken(path)
    return found


def loaded(path: Path, dtype: Dtype, attention: Attention) -> tuple[CausalLM, Tokenizer]:
    """A model that only computes forward, and its tokenizer."""
    return load_policy(path, frozen_dtype(dtype), attention=attention)


def settle_kernel(config: TwoModels, run: Run | None, progress: Progress) -> None:
    """Decide on the attention kernel of the models of a measure, say it, and record it where there is an output."""
    models = [path for path in (config.model, config.against) if path is not None and not holds_results(path)]
    settled = settle_attention(
        config.attention, models, progress, dtype=frozen_dtype(config.dtype), device=default_device()
    )
    if run is not None:
        run.origin["attention"] = settled


def context_of(model: CausalLM) -> int | None:
    """The longest sequence of a model, in tokens; None where it states none."""
    found = getattr(model.config, "max_position_embeddings", None)
    return None if found is None else int(found)
