"""The lock names all that `make quickstart` and `make test` install, with hashes; a file with another one is refused.
What is in an extra is needed by no import of a command."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = ("requirements.lock", "requirements-torch.lock", "requirements-dev.lock")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
ENTRY = re.compile(r"^([\w.-]+)==(\S+)(.*)((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)\n", re.MULTILINE)


def pinned(*files):
    return {canonicalize_name(name): version for file in files for name, version, _, _ in ENTRY.findall(TEXTS[file])}


def needed(requirements):
    """The names of requirements and of all that they need on this machine."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        extras = ["", *requirement.extras]
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            child = Requirement(line)
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                child.marker = None
                waiting.append(child)
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_lock_is_entries_with_hashes_and_nothing_else(name):
    assert ENTRY.sub("", TEXTS[name]).splitlines() == TEXTS[name].splitlines()[:1]
    assert TEXTS[name].startswith("# Written by `make lock`")


def test_the_lock_names_all_that_is_installed():
    core = needed(PROJECT["dependencies"])
    assert core - pinned("requirements.lock", "requirements-torch.lock").keys() == set()
    dev = needed(PROJECT["optional-dependencies"]["dev"])
    assert dev - pinned(*FILES).keys() == set()


def test_the_versions_are_those_that_were_tested_together():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    locked = pinned(*FILES)
    assert {
        name: (version, tested[name]) for name, version in locked.items() if tested.get(name, version) != version
    } == {}
    assert "setuptools" in pinned("requirements.lock")  # which builds gemma2, without a download


def test_no_package_is_in_two_files():
    names = [name for file in FILES for name in pinned(file)]
    assert len(names) == len(set(names))


def test_make_installs_from_the_lock():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "LOCKED := $(PIP) --require-hashes --no-deps" in text
    assert {name for name in FILES if f"$(LOCKED) --requirement {name}" in text} == set(FILES)
    for name in FILES:
        assert re.search(rf"^\$\(VENV\)/\.installed.*{re.escape(name)}", text, re.MULTILINE), name


def test_a_file_with_another_hash_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "planted-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("planted.py", "")
        wheel.writestr("planted-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
        wheel.writestr("planted-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("planted-1.0.dist-info/RECORD", "")
    (tmp_path / "x.lock").write_text(f"planted==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("pip is not in this environment")
    words = ["--isolated", "install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--dry-run"]
    place = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "to")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, *place, "--requirement", str(tmp_path / "x.lock")],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr


# What the extras install, by the name that is imported; the tools of `dev` are extras too.
EXTRAS = {
    *("vllm", "openai", "ray", "lm_eval", "trackio", "tensorboard", "wandb", "gguf"),
    *("pytest", "hypothesis", "mypy", "build", "xdist"),
}
IMPORTS = f"""
import importlib, pkgutil, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
import gemma2.cli
for module in pkgutil.walk_packages(gemma2.cli.__path__, "gemma2.cli."):
    importlib.import_module(module.name)
from gemma2.cli.app import COMMANDS, load
for name in COMMANDS:
    load(name)
print(len(COMMANDS))
"""


def test_no_command_needs_an_extra_to_be_imported():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 15
