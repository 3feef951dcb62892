"""The layers hold: cli -> posttrain -> merging, no cycles, nothing heavy before a command needs it."""

import ast
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from processes import ROOT, finish, start

from gemma2.cli.app import COMMANDS

LAYERS = ("cli", "posttrain", "merging", "core", "configs")
MAY_IMPORT = {
    "cli": {"cli", "posttrain", "merging", "core", "configs"},
    "posttrain": {"posttrain", "merging", "core", "configs"},
    "merging": {"merging", "core"},
    "core": {"core"},
    "configs": {"configs"},
}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numba", "numpy", "matplotlib"}
TORCH_FREE = (
    "core.errors",
    "core.progress",
    "core.outputs.staging",
    "posttrain.schemas.config",
    "posttrain.schemas",
    "posttrain.runs.run_directory",
    "posttrain.runs.estimates",
    "posttrain.runs.commands",
    "posttrain.pipelines.run",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}
PACKAGES = {name.removesuffix(".__init__") for name in MODULES if name.endswith(".__init__")}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, everywhere: bool = True) -> Iterator[str]:
    """Absolute dotted names that a module imports; without `everywhere`, only those that importing it runs."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                folder = [*path.relative_to(ROOT).parts[: -child.level]] if child.level else []
                module = ".".join([*(["gemma2"] if child.level else []), *folder, *filter(None, [child.module])])
                yield module
                if module.removeprefix("gemma2.") in PACKAGES:
                    yield from (f"{module}.{alias.name}" for alias in child.names)
            elif not everywhere and (isinstance(child, ast.FunctionDef | ast.Lambda) or is_type_checking(child)):
                continue
            else:
                yield from visit(child)

    return visit(tree_of(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own_modules(names: Iterator[str]) -> set[str]:
    """`posttrain.chat` for `gemma2.posttrain.data.chat`, and every __init__ that such an import runs first."""
    found = set()
    for name in names:
        parts = name.split(".")[1:] if name.startswith("gemma2.") else []
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            found |= {module, f"{module}.__init__"} & MODULES.keys()
    return found


def packages_of(module: str) -> set[str]:
    """The __init__ of every package that a module lies in: imported before it whatever it says."""
    parts = module.split(".")
    return {".".join([*parts[:end], "__init__"]) for end in range(1, len(parts))}


def offenders(of: Callable[[str, Path], Iterable[str]], layer: str = "") -> dict[str, list[str]]:
    """Module -> what is wrong with it, for the modules of a layer that have something wrong."""
    found = {name: sorted(set(of(name, path))) for name, path in MODULES.items() if name.startswith(layer)}
    return {name: wrong for name, wrong in found.items() if wrong}


def roots(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_a_module_imports_only_its_own_layer_and_those_below():
    def above(module: str, path: Path) -> set[str]:
        return roots(own_modules(imports(path))) - MAY_IMPORT[module.partition(".")[0]]

    assert offenders(above) == {}


def test_packages_are_never_imported_by_their_bare_names():
    assert offenders(lambda _, path: roots(imports(path)) & {*LAYERS, "tests", "bench"}) == {}


def test_merging_does_without_torch():
    assert offenders(lambda _, path: roots(imports(path)) & (HEAVY - {"numba", "numpy"}), "merging.") == {}


def test_the_command_line_imports_nothing_heavy_at_module_level():
    assert offenders(lambda _, path: roots(imports(path, everywhere=False)) & HEAVY, "cli.") == {}


def test_there_are_no_import_cycles():
    graph = {
        name: own_modules(imports(path, everywhere=False)) - {name, *packages_of(name)}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_only_the_console_prints():
    def prints(module: str, path: Path) -> list[str]:
        nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name) and node.id == "print"]
        return [] if module == "cli.terminal.console" else [f"line {node.lineno}" for node in nodes]

    assert offenders(prints) == {}


def test_no_room_is_called_utils():
    names = {path.name for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    assert not {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"} & names


def test_every_module_says_what_it_is():
    def silent(module: str, path: Path) -> list[str]:
        tree = tree_of(path)
        return [] if not tree.body or ast.get_docstring(tree) else ["no docstring"]

    assert offenders(silent) == {}


def test_no_file_is_over_400_lines_and_no_function_over_80():
    def long(module: str, path: Path) -> Iterator[str]:
        if len(path.read_text(encoding="utf-8").splitlines()) > 400:
            yield "the file"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                yield node.name

    assert offenders(long) == {}


def test_the_package_list_is_what_is_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {f"gemma2.{name}" for name in PACKAGES}
    assert set(settings["packages"]) == on_disk == set(settings["package-dir"])
    assert all(
        place == name.removeprefix("gemma2.").replace(".", "/") for name, place in settings["package-dir"].items()
    )
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES.values()}
    assert folders == PACKAGES, "a folder without __init__.py is in no wheel"


# One interpreter runs every page: what any of them imports stays in sys.modules.
PAGES = """
import contextlib, io, sys
from gemma2.cli.main import run
for command in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as page:
        code = run([*command.split(), "--help"])
    assert code == 0 and page.getvalue().startswith("Usage: gemma2"), (command, code)
loaded = {name.partition(".")[0] for name in sys.modules}
print(" ".join(sorted(loaded & set(sys.argv[1].split(",")))))
"""
FREE = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(f"gemma2.{name}")
print(" ".join(sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1].split(",")))))
"""


def heavy_after(script: str, *arguments: str) -> list[str]:
    """The heavy libraries that a fresh interpreter holds after `script`."""
    code, out, err = finish(start(script, ",".join(sorted({*HEAVY, "rich"})), *arguments))
    assert code == 0, err
    return out.split()


def test_no_help_page_imports_a_heavy_library():
    assert heavy_after(PAGES, "", *COMMANDS, "merge slerp", "reward pairs", "config list") == []


def test_the_modules_that_start_up_needs_are_torch_free():
    assert heavy_after(FREE, *TORCH_FREE) == []
