"""Every error of the suite crosses a process boundary unchanged: executors and data workers pickle them."""

import inspect
import pickle
import re
from importlib import import_module
from pathlib import Path

import pytest

from gemma2.core.errors import Gemma2Error

ROOT = Path(__file__).resolve().parents[2]
BASES = "Gemma2Error|UsageError|InputError|OutputError|GuardStop|StageFailed|TurnError"
CLASS = re.compile(rf"^class (\w+)\((?:{BASES})\b", re.M)
FOUND = {
    name: f"gemma2.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
    for layer in ("core", "merging", "posttrain", "cli")
    for path in (ROOT / layer).rglob("*.py")
    for name in CLASS.findall(path.read_text(encoding="utf-8"))
}
FOUND["Gemma2Error"] = Gemma2Error.__module__


@pytest.mark.parametrize("name", sorted(FOUND))
@pytest.mark.parametrize("message", [("the file f is damaged", "restore it"), ("the file f is damaged", "")])
def test_an_error_keeps_message_exit_code_and_attributes_when_it_is_pickled(name, message):
    kind = getattr(import_module(FOUND[name]), name)
    takes_a_code = "code" in inspect.signature(kind).parameters
    error = kind(*message, *((3,) if takes_a_code else ()))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "; ".join(filter(None, message))
    assert copy.exit_code == error.exit_code == (3 if takes_a_code else kind.exit_code)
    assert vars(copy) == vars(error)


def test_the_classes_of_the_parametrized_test_are_all_subclasses():
    for module in FOUND.values():
        import_module(module)
    known, queue = {"Gemma2Error"}, [Gemma2Error]
    while queue:
        for kind in queue.pop().__subclasses__():
            if kind.__module__.startswith("gemma2."):
                known.add(kind.__name__)
                queue.append(kind)
    assert known == FOUND.keys()
