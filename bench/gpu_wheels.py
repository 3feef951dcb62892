"""Wheels that a GPU host without a network lacks: lists them, fetches them to build/gpu-wheels and weighs them.

    python bench/gpu_wheels.py [--list]        fails if they weigh more than 54 MiB

What gemma2 needs is read from its own metadata and that of the packages installed here, at the versions of
constraints.txt. Of that, a host that has PyTorch and what usually comes with it has HOST; a package of HOST travels too
where its version is too old for what is brought. Wheels for Python 3.12 on x86-64 Linux. torch never travels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu-wheels"
LIMIT = 54 * 2**20  # bytes
# Packages of a host with PyTorch, and their versions as far as they are known.
HOST = {
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.2",
    "huggingface-hub": "1.33.0",
    "numpy": "2.5.2",
    **dict.fromkeys(
        (
            *("peft", "typer", "rich", "numba", "llvmlite", "pyyaml", "jinja2", "psutil", "matplotlib", "pandas"),
            *("pyarrow", "xxhash", "fsspec", "filelock", "packaging", "tqdm", "regex", "requests", "httpx", "networkx"),
            *("sympy", "mpmath", "markupsafe", "click", "shellingham", "pygments", "markdown-it-py", "mdurl", "anyio"),
            *("hf-xet", "setuptools", "pillow", "cycler", "kiwisolver", "fonttools", "contourpy", "pyparsing", "idna"),
            *("python-dateutil", "six", "certifi", "h11", "httpcore", "typing-extensions", "annotated-doc", "tzdata"),
            *("charset-normalizer", "urllib3", "sniffio", "attrs", "multidict", "aiohttp"),
        )
    ),
}
NEVER = {"torch"}  # whatever its range: it is the host's, and so are its CUDA libraries
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def pinned() -> dict[str, str]:
    """Versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def wanted() -> dict[str, list[Requirement]]:
    """Package -> what asks for it, of everything that gemma2 needs and the host does not have as it is needed."""
    asked: dict[str, list[Requirement]] = {}
    found: dict[str, list[Requirement]] = {}
    queue = ["gemma2"]
    seen = set(queue)
    while queue:
        for line in metadata.requires(queue.pop()) or []:
            one = Requirement(line)
            name = canonicalize_name(one.name)
            if one.marker is not None and not one.marker.evaluate({"python_version": "3.12", "extra": ""}):
                continue
            asked.setdefault(name, []).append(one)
            if name in NEVER or not lacks(name, asked[name]):
                continue
            found[name] = asked[name]
            if name not in seen:
                seen.add(name)
                queue.append(name)
    return found


def lacks(name: str, asked: list[Requirement]) -> bool:
    """Whether the host has no such package, or a version that is out of range."""
    if name not in HOST:
        return True
    version = HOST[name]
    return version is not None and any(not one.specifier.contains(Version(version), True) for one in asked)


def fetch(names: list[str]) -> None:
    """Download the wheels, without what they depend on."""
    versions = pinned()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    pinned_names = [f"{name}=={versions.get(name) or metadata.version(name)}" for name in names]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, "--dest", str(FOLDER)]
    subprocess.run([*command, *pinned_names], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the packages, fetch nothing")
    options = parser.parse_args()
    needed = wanted()
    if options.list:
        for name, reasons in sorted(needed.items()):
            print(f"{name}  {', '.join(sorted({str(one.specifier) or 'any' for one in reasons}))}")
        return
    fetch(sorted(needed))
    sizes = {path.name: path.stat().st_size for path in sorted(FOLDER.glob("*.whl"))}
    for name, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB  {len(sizes)} wheels in {FOLDER.relative_to(ROOT)}; limit {LIMIT / 2**20:.0f} MiB")
    if total > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
