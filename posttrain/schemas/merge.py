"""`gemma2 merge METHOD` as a stage of a pipeline. Its options are those of the table of merge methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator

from gemma2.core.errors import UsageError
from gemma2.merging.methods.option import OPTIONS, Option
from gemma2.merging.methods.request import FILES, Granularity, MergeRequest
from gemma2.merging.methods.request_check import check_chosen, check_request
from gemma2.merging.methods.table import METHODS
from gemma2.merging.recipes.place import Place, is_rules, read_option
from gemma2.merging.recipes.recipe import read_slices

from .config import Config, closest

__all__ = ["MergeConfig"]

STAGE = Path("the stage")  # for messages: the caller says which


class _MergeStage(Config):
    """`gemma2 merge METHOD` inside a pipeline; the names are those of its flags, the values those of a merge file."""

    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset({"method", "models"})
    PATHS_AS_TEXT: ClassVar[frozenset[str]] = frozenset({"tokenizer", *FILES})

    method: str = Field(description="merge method: the second word of the command")
    models: tuple[Path, ...] = Field(min_length=1, description="model directories or hub ids; their order counts")
    base: Path | None = Field(None, description="the init that task vectors start from")
    granularity: Granularity | None = Field(None, description="tensors that share coefficients or thresholds")
    tokenizer: str | None = Field(None, description="tokenizer of the output: base, union or a model")
    allow_config: tuple[str, ...] = Field((), description="keys of config.json that may differ")
    chat_template: str | None = Field(None, description="chat template of the output: number of a model, base, a file")
    generation_config: str | None = Field(None, description="of the output: number of a model, base, a file")
    special_tokens: str | None = Field(None, description="of the output: number of a model, base, a file")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="dtype of the output")
    slices: tuple[dict[str, Any], ...] = Field((), description="layers to stack, as in a merge file")

    @field_validator("method")
    @classmethod
    def _is_in_the_table(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"is not a merge method; {closest(value, METHODS)}")
        return value

    @field_validator(*FILES, mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _is_complete(self) -> _MergeStage:
        try:
            check_chosen(self.request())
        except UsageError as error:
            raise ValueError(str(error).replace(f" in {STAGE}", "")) from error
        return self

    def request(self) -> MergeRequest:
        """The merge as the engine takes it."""
        names = (
            *("base", "granularity", "tokenizer", "allow_config", "dtype"),
            *("chat_template", "generation_config", "special_tokens"),
        )
        common: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.slices:
            place = Place(STAGE, key="slices")
            common["slices"] = read_slices(list(self.slices), place, self.models, self.base)
        values = {
            option.attribute: read_option(option, _as_in_a_file(getattr(self, name)), Place(STAGE, key=name))
            for name, option in OPTIONS.items()
            if getattr(self, name) not in (None, ())
        }
        return MergeRequest(method=self.method, models=self.models, **common, values=values)

    def recorded(self) -> dict[str, Any]:
        """As the engine records it: options and defaults, no paths. Raises UsageError for an option not taken."""
        return check_request(self.request()).options()


def _as_in_a_file(value: object) -> object:
    """Tuples as lists, which is what YAML has."""
    return [_as_in_a_file(item) for item in value] if isinstance(value, list | tuple) else value


def _field(option: Option) -> tuple[Any, Any]:
    """One option as a field: its values are kept as a merge file gives them, and checked by the same reader."""

    def check(value: object) -> object:
        if option.per and (not isinstance(value, list | tuple) or is_rules(value)):
            value = (value,)
        if value is not None and value != ():
            try:
                read_option(option, _as_in_a_file(value), Place(STAGE, key=option.name))
            except UsageError as error:
                raise ValueError(str(error).replace(f" in {STAGE}", "")) from error
        return _plain(value) if option.kind == "number" else value

    initial = () if option.per else option.initial
    return Annotated[Any, BeforeValidator(check)], Field(initial, description=option.help)


def _plain(value: object) -> object:
    """Numbers as floats and lists as tuples, so that equal values have one form."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


if TYPE_CHECKING:

    class MergeConfig(_MergeStage):
        """As built below."""
else:
    # Built from the table: a method with a new option brings the field with it.
    FIELDS = {name: _field(option) for name, option in OPTIONS.items()}
    MergeConfig = create_model("MergeConfig", __base__=_MergeStage, __doc__=_MergeStage.__doc__, **FIELDS)
