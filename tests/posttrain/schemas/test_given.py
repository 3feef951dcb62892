"""0, 0.0 and an empty text are values: none of them is taken for an option that is not given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from gemma2.core.errors import UsageError
from gemma2.posttrain.filters.rules import active_filters
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import DistillConfig, FilterConfig, GenerateConfig, MergeConfig
from gemma2.posttrain.schemas.config import Config, is_given, resolve

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ("cli", "posttrain", "merging", "core")
SCHEMAS = sorted({command.schema for command in COMMANDS.values()}, key=lambda schema: schema.__name__)


def takes(field: FieldInfo, value: object) -> bool:
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return TypeAdapter(kind).validate_python(value, strict=True) is not None
    except ValidationError:
        return False


def zeros() -> Iterator[tuple[type[Config], str, object]]:
    """Every field that takes 0 and has another default."""
    for schema in SCHEMAS:
        for name, field in schema.model_fields.items():
            for zero in (0, 0.0):
                default = field.get_default(call_default_factory=True)
                if takes(field, zero) and (default is None or default != zero):
                    yield schema, name, zero


ZEROS = list(zeros())


def test_0_is_given_and_nothing_is_not():
    assert all(map(is_given, (0, 0.0, "", True, [0], (None,), {"a": None})))
    assert not any(map(is_given, (None, False, [], (), {})))


def test_a_largest_share_of_0_drops_every_refusal():
    assert "refusal" in active_filters(FilterConfig(data="d", max_refusal_share=0))
    assert "refusal" not in active_filters(FilterConfig(data="d"))
    assert "length" in active_filters(FilterConfig(data="d", min_words=0))


@pytest.mark.parametrize(
    ("schema", "name", "zero"),
    [case for case in ZEROS if case[0] is not MergeConfig],  # its options belong to methods: tests/merging
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_flag_of_0_is_kept(schema, name, zero):
    config = resolve(schema, flags=_required(schema) | {name: zero})
    assert getattr(config, name) == zero and getattr(config, name) is not False


def _required(schema: type[Config]) -> dict[str, object]:
    """The least that makes a configuration, whatever else is set."""
    together = {
        DistillConfig: {"teacher": "t", "prompts": "p", "heldout": "h", "data": "d"},
        GenerateConfig: {"engine": "openai", "price_in": 1, "price_out": 1},
    }
    return {key: "x" for key, field in schema.model_fields.items() if field.is_required()} | together.get(schema, {})


def _tests_of_truth(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield from node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
        elif isinstance(node, ast.BoolOp):
            yield from node.values[:-1]  # the last one is the result
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand
        elif isinstance(node, ast.comprehension):
            yield from node.ifs


@cache
def _trees() -> list[tuple[Path, ast.Module]]:
    paths = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_no_code_asks_whether_a_number_that_may_be_left_out_is_true():
    names = {name for schema, name, _ in ZEROS if schema.model_fields[name].default is None}
    assert {"max_refusal_share", "min_words", "price_in", "on_policy_fraction"} <= names
    found = [
        f"{path.relative_to(ROOT)}:{test.lineno}: {ast.unparse(test)}"
        for path, tree in _trees()
        for test in _tests_of_truth(tree)
        if isinstance(test, ast.Attribute) and test.attr in names
    ]
    assert not found, "ask `is not None`"


def test_no_code_looks_for_a_value_among_some_that_0_equals():
    """`0.0 in (None, False)` is true."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in node.comparators
        for item in (side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side])
        if isinstance(item, ast.Constant) and item.value is False
        if not any(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops)
    ]
    assert not found, "use `is_given` (posttrain/schemas/config.py), or `is False`"


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        (GenerateConfig, "prompts"),
        (GenerateConfig, "base_url"),
        (GenerateConfig, "teacher"),
        (FilterConfig, "safety_model"),
    ],
)
def test_an_empty_text_is_not_the_working_directory_and_not_left_out(schema, name):
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} '' is empty, .*; leave it out$"):
        resolve(schema, flags=_required(schema) | {name: ""})
    assert resolve(FilterConfig, flags={"data": "d", "phone_region": ""}).phone_region == ""
