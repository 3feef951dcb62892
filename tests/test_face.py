"""The face of the suite, frozen: commands, flags, keys and defaults, so that a change of it shows in review.

`tests/face.txt` is the list. After a change that is meant: `python tests/test_face.py` writes it anew, and
CHANGELOG.md says what users of scripts and recipes have to do.
"""

from collections.abc import Iterator
from pathlib import Path

from commands import all_commands

FROZEN = Path(__file__).with_name("face.txt")


def flags() -> Iterator[str]:
    """`gemma2 merge slerp --t FLOAT`, one line for each command and each of its parameters."""
    for command, parsed in all_commands():
        yield f"gemma2 {command}"
        for parameter in parsed.params:
            names = "/".join(sorted([*parameter.opts, *parameter.secondary_opts], key=len))
            kind = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or parameter.type.name}"
            default = "" if parameter.default in (None, False) else f" = {parameter.default}"
            yield f"gemma2 {command} {names}{kind}{default}"


def keys() -> Iterator[str]:
    """`SftConfig.steps = 100`, one line for each key of each schema."""
    from gemma2.posttrain import schemas
    from gemma2.posttrain.schemas import measures
    from gemma2.posttrain.schemas.config import Config

    homes = {name: home for home in (schemas, measures) for name in home.__all__}
    for name, home in sorted(homes.items()):
        schema = getattr(home, name)
        if isinstance(schema, type) and issubclass(schema, Config):
            for key, field in schema.model_fields.items():
                default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
                yield f"{name}.{key} = {default}"


def face() -> str:
    return "\n".join([*flags(), "", *keys()]) + "\n"


def test_commands_flags_keys_and_defaults_are_those_that_were_agreed_on():
    expected, found = FROZEN.read_text(encoding="utf-8").splitlines(), face().splitlines()
    changed = [f"- {line}" for line in expected if line not in found]
    changed += [f"+ {line}" for line in found if line not in expected]
    assert changed == [], "if this is meant: python tests/test_face.py, and an entry in CHANGELOG.md"
    assert found == expected, "the order changed: python tests/test_face.py"


if __name__ == "__main__":
    FROZEN.write_text(face(), encoding="utf-8")
