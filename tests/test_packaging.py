"""The wheel holds the namespace `gemma2` and nothing generic, with its data files, and works where it is installed."""

import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from processes import ROOT

PACKAGES = ("cli", "posttrain", "merging", "core", "configs")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, offline, with the setuptools that is installed."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in (*PACKAGES, "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_only_the_namespace_and_its_metadata_are_at_the_top(names):
    assert {name.partition("/")[0] for name in names} == {"gemma2", f"gemma2-{PROJECT['project']['version']}.dist-info"}
    assert {name.split("/")[1] for name in names if name.startswith("gemma2/")} == set(PACKAGES)


def test_every_file_of_the_packages_is_in_the_wheel(names):
    on_disk = {
        f"gemma2/{path.relative_to(ROOT)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("gemma2/")} == on_disk


def test_the_metadata_has_licence_command_and_extras(wheel, names):
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in names
    assert set(metadata.get_all("Provides-Extra")) >= {"vllm", "ray", "eval", "track", "dev"}
    assert archive.read(f"{folder}/entry_points.txt").decode().split("\n")[:2] == [
        "[console_scripts]",
        "gemma2 = gemma2.cli.main:main",
    ]


SCRIPT = """
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="gemma2")
assert sys.argv[1] in sys.modules.get("gemma2.cli", script.load() and sys.modules["gemma2.cli"]).__file__
sys.argv = ["gemma2", *sys.argv[2:]]
script.load()()
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--version"], f"gemma2 {PROJECT['project']['version']}"), (["config", "list"], None), (["sft", "-h"], "Usage:")],
)
def test_the_installed_wheel_runs_without_the_source_tree(wheel, tmp_path, words, said):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said) if said else Path(tmp_path, "gemma2", "configs").is_dir()


def test_what_is_tested_together_satisfies_what_is_promised():
    """constraints.txt pins every direct dependency, within the range of pyproject.toml."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    promised = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, promised):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not pinned"
        assert requirement.specifier.contains(pinned[name], prereleases=True), requirement


def test_the_build_requirement_is_part_of_the_development_tools():
    (required,) = PROJECT["build-system"]["requires"]
    assert required in PROJECT["project"]["optional-dependencies"]["dev"]
