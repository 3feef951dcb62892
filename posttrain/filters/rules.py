"""The names of all filters in order, and the filters on single rows, set up from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

from gemma2.core.errors import UsageError
from gemma2.posttrain.schemas import FilterConfig
from gemma2.posttrain.schemas.config import is_given
from gemma2.posttrain.schemas.filter import FilterName

from .criteria.contamination import EvaluationTexts, contaminated
from .criteria.form import empty, length, repetition, truncated
from .criteria.identity import claim_finder
from .criteria.language import language
from .criteria.personal import personal
from .criteria.refusals import disclaimer
from .criteria.sample import Sample
from .criteria.unsafe import unsafe

__all__ = ["ORDER", "active_filters", "row_filters"]

RowFilter = Callable[[Sample], str | None]

ORDER: tuple[str, ...] = get_args(FilterName)
# The settings without which a filter does nothing; any one of them activates it.
NEEDS = {
    "length": ("min_words", "max_words", "min_chars", "max_chars"),
    "language": ("language",),
    "disclaimer": ("drop_disclaimers",),
    "unsafe": ("unsafe_words", "safety_model"),
    "contaminated": ("decontaminate",),
    "refusal": ("max_refusal_share",),
}


def active_filters(config: FilterConfig) -> list[str]:
    """Return the names of the filters that run, in order. Raises UsageError for a requested filter without settings."""
    for name in config.filters:
        if not _set_up(name, config):
            flags = " or ".join(f"--{need.replace('_', '-')}" for need in NEEDS[name])
            raise UsageError(f"--filters {name} does nothing by itself", f"give {flags}")
    wanted = config.filters or ORDER
    return [name for name in ORDER if name in wanted and name not in config.skip and _set_up(name, config)]


def row_filters(config: FilterConfig, evaluation: EvaluationTexts | None) -> dict[str, RowFilter]:
    """Return the active filters that need only the row itself."""
    made: dict[str, RowFilter] = {
        "empty": empty,
        "truncated": partial(truncated, require_ending=config.require_ending),
        "length": partial(length, config=config),
        "repetition": partial(repetition, limit=config.max_repetition),
        "language": partial(language, codes=config.language, confidence=config.language_confidence),
        "personal": partial(personal, region=config.phone_region),
        "identity": claim_finder(config.identity),
        "disclaimer": disclaimer,
    }
    if config.unsafe_words:
        made["unsafe"] = partial(unsafe, categories=config.unsafe_words, terms=config.unsafe_terms)
    if evaluation is not None:
        made["contaminated"] = partial(contaminated, evaluation=evaluation)
    return {name: made[name] for name in active_filters(config) if name in made}


def _set_up(name: str, config: FilterConfig) -> bool:
    needs = NEEDS.get(name, ())
    return not needs or any(is_given(getattr(config, need)) for need in needs)
