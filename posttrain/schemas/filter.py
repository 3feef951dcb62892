"""`gemma2 filter`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from .config import Need, is_given
from .fields import Data, RowFields, Seed

# In the order in which they are applied: the first filter that drops a row gives the reason.
FilterName = Literal[
    "turns",
    "empty",
    "truncated",
    "length",
    "repetition",
    "language",
    "personal",
    "identity",
    "disclaimer",
    "unsafe",
    "contaminated",
    "duplicate",
    "near-duplicate",
    "refusal",
]
Subset = Literal["attribution", "hedging", "refusal"]
UnsafeCategory = Literal["general", "sexual", "slurs"]


# The settings without which a filter does nothing; any one of them activates it.
SWITCHES: dict[str, tuple[str, ...]] = {
    "length": ("min_words", "max_words", "min_chars", "max_chars"),
    "language": ("language",),
    "disclaimer": ("drop_disclaimers",),
    "unsafe": ("unsafe_words", "safety_model"),
    "contaminated": ("decontaminate",),
    "refusal": ("max_refusal_share",),
}
# Setting -> the filters that read it.
READ_BY: dict[str, tuple[str, ...]] = {
    **{name: (criterion,) for criterion, names in SWITCHES.items() for name in names},
    **dict.fromkeys(("keep", "keep_patterns"), ("length", "disclaimer", "refusal")),
    "require_ending": ("truncated",),
    "max_repetition": ("repetition",),
    "language_confidence": ("language",),
    "phone_region": ("personal",),
    "identity": ("identity",),
    **dict.fromkeys(("unsafe_terms", "safety_labels", "safety_threshold", "safety_max_length"), ("unsafe",)),
    "decontaminate_ngram": ("contaminated",),
    "dedup_on": ("duplicate", "near-duplicate"),
    **dict.fromkeys(("near_threshold", "shingle_words"), ("near-duplicate",)),
}


def _runs(config: FilterConfig, criterion: str) -> bool:
    """Whether --filters and --skip leave a filter in."""
    return criterion not in config.skip and (not config.filters or criterion in config.filters)


def _read(name: str) -> Need:
    readers = READ_BY[name]
    named = " and ".join(readers)
    return Need(
        (name,),
        f"where --filters or --skip leave out {named}",
        lambda config: any(_runs(config, criterion) for criterion in readers),
        f"let {readers[0]} run",
    )


class FilterConfig(RowFields):
    """Drop rows that a model should not learn from, each with its reason (Gemma 2 report, section 4)."""

    NEEDS: ClassVar[tuple[Need, ...]] = (
        *map(_read, READ_BY),
        Need(("unsafe_terms",), "without --unsafe-words", lambda config: config.unsafe_words),
        Need(
            ("safety_labels", "safety_threshold", "safety_max_length", "batch_size"),
            "without --safety-model",
            lambda config: config.safety_model is not None,
        ),
        Need(("language_confidence",), "without --language", lambda config: config.language),
        Need(("decontaminate_ngram",), "without --decontaminate", lambda config: config.decontaminate),
    )

    data: Data
    filters: tuple[FilterName, ...] = Field((), description="use only these filters; default: all that are configured")
    skip: tuple[FilterName, ...] = Field((), description="do not use these filters")
    keep: tuple[Subset, ...] = Field(
        (), description="subsets that length, disclaimer and refusal do not drop: attribution, hedging, refusal"
    )
    keep_patterns: dict[str, str] = Field(
        default_factory=dict, description="further subsets to keep: name and regular expression over the model's turns"
    )
    require_ending: bool = Field(False, description="truncated: also drop answers without closing punctuation")
    min_words: int | None = Field(None, ge=0, description="length: fewest words of the model's turns")
    max_words: int | None = Field(None, ge=1, description="length: most words of the model's turns")
    min_chars: int | None = Field(None, ge=0, description="length: fewest characters of the model's turns")
    max_chars: int | None = Field(None, ge=1, description="length: most characters of the model's turns")
    max_repetition: float = Field(
        0.6, gt=0, le=1, description="repetition: largest share of a turn's word 4-grams that occur earlier in it"
    )
    language: tuple[str, ...] = Field((), description="language: codes to keep (ISO 639: en, de, ...)")
    language_confidence: float = Field(
        0.9, gt=0, le=1, description="language: drop only when another language is at least this probable"
    )
    phone_region: str = Field("US", pattern="^([A-Z]{2})?$", description="personal: country of numbers without +")
    identity: tuple[str, ...] = Field(
        ("Gemma", "Google", "Google DeepMind", "DeepMind"), description="identity: names that the model may claim"
    )
    drop_disclaimers: bool = Field(False, description="disclaimer: drop 'as an AI language model' and similar")
    unsafe_words: tuple[UnsafeCategory, ...] = Field(
        (),
        description="unsafe: drop answers with words of a list (general, sexual, slurs); it misses offence in other"
        " words and most languages but English; default: no list",
    )
    unsafe_terms: int = Field(1, ge=1, description="unsafe: matches of the word list that drop a row")
    safety_model: Path | None = Field(
        None, description="unsafe: classifier or ShieldGemma-style model that reads the rows that are left"
    )
    safety_labels: tuple[str, ...] = Field((), description="unsafe: labels of the classifier that mean unsafe")
    safety_threshold: float = Field(0.5, gt=0, lt=1, description="unsafe: lowest probability that drops a row")
    safety_max_length: int = Field(1024, ge=16, description="unsafe: most tokens of a row that the safety model reads")
    batch_size: int = Field(16, ge=1, description="unsafe: rows that the safety model reads at once")
    decontaminate: tuple[Path, ...] = Field(
        (), description="contaminated: evaluation sets that the rows must not overlap"
    )
    decontaminate_ngram: int = Field(13, ge=3, description="contaminated: consecutive equal words that are an overlap")
    dedup_on: Literal["both", "prompt", "completion"] = Field(
        "both", description="duplicate, near-duplicate: which turns are compared"
    )
    near_threshold: float = Field(
        0.8, gt=0.1, lt=1, description="near-duplicate: Jaccard similarity of word shingles that drops the later row"
    )
    shingle_words: int = Field(3, ge=1, le=13, description="near-duplicate: words per shingle")
    max_refusal_share: float | None = Field(None, ge=0, lt=1, description="refusal: largest share of the kept rows")
    all_reasons: bool = Field(False, description="list all reasons in dropped.jsonl, not only the first")
    workers: int | None = Field(None, ge=1, description="processes; default: one per core")
    shard_rows: int = Field(100_000, ge=1, description="rows per output file")
    seed: Seed = 0

    @model_validator(mode="after")
    def _filters_asked_for_are_set_up(self) -> FilterConfig:
        for name in self.filters:
            if not self.is_set_up(name):
                flags = " or ".join(f"--{switch.replace('_', '-')}" for switch in SWITCHES[name])
                raise ValueError(f"--filters {name} does nothing by itself; give {flags}")
        return self

    def is_set_up(self, name: str) -> bool:
        """Whether a filter has the settings without which it does nothing."""
        switches = SWITCHES.get(name, ())
        return not switches or any(is_given(getattr(self, switch)) for switch in switches)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> FilterConfig:
        for unit in ("words", "chars"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} {low} is above max_{unit} {high}")
        return self
