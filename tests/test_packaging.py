"""The source archive holds every tracked file. The wheel made from it holds the namespace `gemma2` and nothing generic,
with its data files, and works where it is installed."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from processes import ROOT

# Python before 3.11.4, as Debian 12 has it, knows no filter.
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
PACKAGES = ("cli", "posttrain", "merging", "core", "configs")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILT = {"build", "dist", "runs", "quickstart", "__pycache__"}  # never sources; hidden folders are neither
RELEASED = os.environ.get("GEMMA2_DIST")  # a folder with the archives of a release, to test instead of fresh ones
HIDDEN_SOURCES = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}


def git_files(*options):
    """The files that git lists, or None where this is not the root of a readable repository."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()} if done.returncode == 0 else None


def files_on_disk():
    """What git would list, in a checkout without git."""

    def is_source(part):
        return part in HIDDEN_SOURCES or not (part.startswith(".") or part in BUILT or part.endswith(".egg-info"))

    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if all(map(is_source, path.parts))}


def build(kind, tree, out):
    """Build "sdist" or "wheel", offline, with the setuptools that is installed."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source archive of a copy: of every file that is tracked, or new and not ignored."""
    if RELEASED:
        (path,) = Path(RELEASED).resolve().glob("*.tar.gz")
        return path
    tree = tmp_path_factory.mktemp("tree")
    for name in git_files("--cached", "--others", "--exclude-standard") or files_on_disk():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the unpacked source archive, as a release is."""
    if RELEASED:
        (path,) = Path(RELEASED).resolve().glob("*.whl")
        return path
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, **SAFELY)
    (tree,) = place.iterdir()
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_source_archive_holds_every_tracked_file(sdist):
    """Among them the whole test suite, docs, benchmarks, Makefile and the entry point of CI."""
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tracked = git_files("--cached") or files_on_disk()
    assert {"tests/test_packaging.py", "Makefile", "constraints.txt", ".ci/run"} <= tracked
    assert tracked - held == set()
    assert [name for name in held if "__pycache__" in name or name.endswith(".pyc")] == []


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
    [
        (["--version"], f"gemma2 {PROJECT['project']['version']}"),
        (["recipes", "list"], None),
        (["sft", "-h"], "Usage:"),
    ],
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


def test_the_citation_names_the_current_version():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]


def test_the_build_requirement_is_part_of_the_development_tools():
    (required,) = PROJECT["build-system"]["requires"]
    assert required in PROJECT["project"]["optional-dependencies"]["dev"]


def data_files_of_the_package():
    """Files below the package folders that are no code, and that git tracks."""
    tracked = git_files("--cached", "--others", "--exclude-standard") or files_on_disk()
    return {name for name in tracked if name.partition("/")[0] in PACKAGES and not name.endswith(".py")}


def test_the_wheel_holds_every_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in data_files_of_the_package() if f"gemma2/{name}" not in names} == set()


INSTALLERS = {
    "pip": [["{python}", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "{tree}"]],
    "uv": [["uv", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--python", "{python}", "{tree}"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("installer", INSTALLERS)
def test_a_clone_installs_as_the_readme_says_and_the_command_runs_elsewhere(sdist, tmp_path, installer):
    """A new environment that sees the libraries of this one and nothing else of it; no network is needed."""
    if installer == "uv" and not shutil.which("uv"):
        pytest.skip("uv is not installed")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **SAFELY)
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--copies", str(place)], check=True)
    python = place / "bin" / "python"
    (site,) = place.glob("lib/python3*/site-packages")
    for old in site.glob("setuptools*"):  # of venv itself, too old to build with
        shutil.rmtree(old)
    (site / "libraries.pth").write_text(str(libraries_only(tmp_path / "libraries")) + "\n")
    for words in INSTALLERS[installer]:
        command = [word.format(python=python, tree=tree) for word in words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tree)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for words in (["--help"], ["quickstart", "--help"], ["recipes", "show", "align"], ["help", "sft"]):
        command = [str(place / "bin" / "gemma2"), *words]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert done.stdout
    code = "import gemma2.cli, sys; print(gemma2.cli.__file__)"
    where = subprocess.run([str(python), "-c", code], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert where.stdout.startswith(str(site))


def libraries_only(place):
    """A folder with links to the installed libraries, without an editable gemma2."""
    import pydantic

    place.mkdir()
    for path in Path(pydantic.__file__).parents[1].iterdir():
        if "gemma2" not in path.name and path.suffix != ".pth":
            (place / path.name).symlink_to(path)
    return place
