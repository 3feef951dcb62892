"""Every error of the suite crosses a process boundary unchanged: executors and data workers pickle them."""

import errno
import inspect
import pickle
import re
import resource
import signal
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from gemma2.core.errors import Gemma2Error, refusal

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


# --- failures of the operating system that libraries report in their own way -----------------------------------------


@pytest.fixture
def no_room(monkeypatch):
    """No file can grow beyond a kilobyte, as on a full disk, but with another number of error.

    Nothing is imported meanwhile: Python would cut its cache of bytecode.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def by_safetensors(path):
    save_file({"weight": torch.zeros(4096)}, path)


def by_torch(path):
    torch.save({"weight": torch.zeros(4096)}, path)


def by_tokenizers(path):
    Tokenizer(models.WordLevel({f"word{number}": number for number in range(999)}, "word0")).save(str(path))


def by_python(path):
    path.write_bytes(bytes(4096))


@pytest.mark.parametrize("write", [by_safetensors, by_torch, by_tokenizers, by_python])
def test_a_library_that_cannot_write_is_one_line(no_room, tmp_path, write):
    with pytest.raises(Exception) as caught:
        write(tmp_path / "file")
    line = refusal(caught.value)
    assert line is not None, repr(caught.value)
    assert "\n" not in line
    assert "; " in line


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(errno.EINVAL, "odd"), KeyError("(os error)")]
)
def test_other_exceptions_are_bugs(error):
    assert refusal(error) is None


def test_the_cause_of_an_exception_counts():
    error = RuntimeError("the trainer failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "weights")
    assert refusal(error) == "No space left on device: weights; free some space, then start the command again"
