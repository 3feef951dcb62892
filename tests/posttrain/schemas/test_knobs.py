"""Every field of every schema reaches the place where it is used."""

import pytest
from field_reads import frozen, table

from gemma2.posttrain import schemas

SCHEMAS = {name: getattr(schemas, name) for name in schemas.__all__}
KNOBS = [f"{name}.{key}" for name, schema in SCHEMAS.items() for key in schema.model_fields]


def kin(schema):
    """A schema, its bases and the schemas below it, by name: a read of any of them is one of its fields."""
    below = {other.__name__ for other in SCHEMAS.values() if issubclass(other, schema)}
    return below | {base.__name__ for base in schema.__mro__}


def lines_of(knob, found):
    name, _, key = knob.partition(".")
    mine = {f"{other}.{key}" for other in kin(SCHEMAS[name])}
    return {line: count for line, count in found.items() if line.split()[0] in mine}


@pytest.mark.parametrize("knob", KNOBS)
def test_knob_is_read_where_it_was(knob):
    agreed, found = lines_of(knob, frozen()), lines_of(knob, table())
    assert {line: count for line, count in agreed.items() if found.get(line, 0) < count} == {}
