"""The source of a user's functions: their module, and every module of the user's that it imports. Torch-free.

Imports are read from the source, so nothing of the user's runs. What is installed (the standard library, packages) is
not part of it: versions stand for that. Modules that are imported under a name that is put together while the program
runs, and files that a function reads, are not seen; docs/pipelines.md says so.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from gemma2.core.outputs.digest_cache import Stamp, stamp_of
from gemma2.core.outputs.digests import digest_input
from gemma2.posttrain.schemas.config import Config

__all__ = ["FUNCTIONS", "code_of", "modules_of"]

# Fields that name Python functions, as module:function.
FUNCTIONS = ("reward_fn", "judge_fn", "judge")
INSTALLED = ("site-packages", "dist-packages")


def code_of(config: Config) -> dict[str, dict[str, str]]:
    """Return `module:function` -> module -> digest of its source, for every function that a configuration names.

    A module that cannot be found, or has no source, is left out: the caller of the function reports it.
    """
    found = {}
    for option in FUNCTIONS:
        value = getattr(config, option, None)
        for name in value if isinstance(value, tuple) else (value,):
            module = str(name).partition(":")[0] if name and ":" in str(name) else ""
            if module.replace(".", "").isidentifier() and (files := modules_of(module)):
                found[str(name)] = {key: digest_input(path) for key, path in sorted(files.items())}
    return found


def modules_of(name: str) -> dict[str, Path]:
    """Return module -> file for a module and everything of the user's that it imports, by what its source says."""
    found: dict[str, Path] = {}
    waiting = [name]
    seen: set[str] = set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for module, spec in _found(current):
            place = Path(spec.origin) if spec.has_location and spec.origin else None
            if place is None or not place.is_file() or (module in found):
                continue
            if _is_installed(place) and module != name:
                continue
            found[module] = place
            if place.suffix == ".py" and not _is_installed(place):
                package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
                waiting += _imported(place, stamp_of(place), package)
    return found


def _found(name: str) -> Iterator[tuple[str, ModuleSpec]]:
    """Yield the packages above a module and the module itself, found without importing any of them."""
    parts = name.split(".")
    path: list[str] | None = None
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        try:
            spec = PathFinder.find_spec(module, path)
        except (ImportError, ValueError):
            return
        if spec is None:
            return
        yield module, spec
        if spec.submodule_search_locations is None:
            return
        path = list(spec.submodule_search_locations)


@lru_cache(maxsize=1024)
def _imported(path: Path, stamp: Stamp, package: str) -> tuple[str, ...]:
    """Return the modules that the source in a file names in its imports, absolute; `a.b` of `from a import b` too."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += _imported_from(node, package)
        elif isinstance(node, ast.Call) and (text := _imported_by_call(node)):
            names.append(text)
    return tuple(name for name in names if name.partition(".")[0] not in sys.stdlib_module_names)


def _imported_from(node: ast.ImportFrom, package: str) -> list[str]:
    parts = package.split(".") if package else []
    above = parts[: len(parts) - (node.level - 1)] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    inside = [f"{base}.{alias.name}" if base else alias.name for alias in node.names if alias.name != "*"]
    return [*([base] if base else []), *inside]


def _imported_by_call(node: ast.Call) -> str:
    """The module of `importlib.import_module("name")` and `__import__("name")`."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first = node.args[0] if node.args else None
    if called in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value.lstrip(".")
    return ""


@lru_cache(maxsize=1)
def _library_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple({Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to the standard library, to an installed package or to this suite."""
    place = path.resolve()
    own = Path(__file__).resolve().parents[2]
    return (
        any(part in INSTALLED for part in place.parts)
        or any(place.is_relative_to(folder) for folder in _library_folders())
        or any(place.is_relative_to(own / room) for room in ("core", "merging", "posttrain", "cli"))
    )
