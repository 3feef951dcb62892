"""Write the lock: every package of `make quickstart` and `make test`, with the hashes of all its published files.

python .ci/lock.py UV     (`make lock`)

requirements.lock        what gemma2 needs, and setuptools, which builds it
requirements-dev.lock    what the development tools need besides
requirements-torch.lock  torch and what only it needs. An index of builds (CPU, another CUDA) has other files than PyPI,
                         so the Makefile leaves this one out where pip would take such a build

The versions are those of constraints.txt. The lock is of all platforms: each line has the marker of those that need it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = "# Written by `make lock`: the versions of constraints.txt with the hashes of all their published files.\n"
OF_TORCH = re.compile(r"torch$|triton$|nvidia-|cuda-")


def compiled(uv: str, *extras: str) -> dict[str, str]:
    """Package -> its lines in a lock: requirement, marker, hashes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = ROOT / "build" / "build-requirements.in"
    build.parent.mkdir(exist_ok=True)
    build.write_text("\n".join(project["build-system"]["requires"]))
    floor = project["project"]["requires-python"].removeprefix(">=")
    words = [
        *(uv, "pip", "compile", "pyproject.toml", str(build), "--constraint", "constraints.txt", "--universal"),
        *("--generate-hashes", "--python-version", floor, "--no-config", "--no-annotate", "--no-header", "--quiet"),
        *(f"--extra={extra}" for extra in extras),
    ]
    text = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries = re.findall(r"^([\w.-]+)(==.*(?:\n .*)*\n)", text, re.MULTILINE)
    return {name: name + rest for name, rest in entries}


def main() -> None:
    """Write the three files."""
    core, dev = compiled(sys.argv[1]), compiled(sys.argv[1], "dev")
    parts = {
        "requirements.lock": [text for name, text in core.items() if not OF_TORCH.match(name)],
        "requirements-dev.lock": [text for name, text in dev.items() if name not in core],
        "requirements-torch.lock": [text for name, text in core.items() if OF_TORCH.match(name)],
    }
    for name, entries in parts.items():
        (ROOT / name).write_text(HEAD + "".join(entries), encoding="utf-8")
        sys.stdout.write(f"{name}: {len(entries)} packages\n")


if __name__ == "__main__":
    main()
