"""The names of all filters in order, and the filters on single rows, set up from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

from gemma2.posttrain.schemas import FilterConfig
from gemma2.posttrain.schemas.filter import FilterName

from .criteria.contamination import EvaluationTexts, contaminated
from .criteria.form import empty, length, repetition, truncated
from .criteria.identity import claim_finder
from .criteria.language import check_codes, language
from .criteria.personal import check_region, personal
from .criteria.refusals import disclaimer
from .criteria.sample import Sample
from .criteria.unsafe import unsafe

__all__ = ["ORDER", "active_filters", "check_settings", "row_filters"]

RowFilter = Callable[[Sample], str | None]

ORDER: tuple[str, ...] = get_args(FilterName)


def active_filters(config: FilterConfig) -> list[str]:
    """Return the names of the filters that run, in order."""
    wanted = config.filters or ORDER
    return [name for name in ORDER if name in wanted and name not in config.skip and config.is_set_up(name)]


def check_settings(config: FilterConfig) -> None:
    """Raise UsageError for a language or a region that the library of its filter does not know."""
    active = active_filters(config)
    if "language" in active:
        check_codes(config.language)
    if "personal" in active:
        check_region(config.phone_region)


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
