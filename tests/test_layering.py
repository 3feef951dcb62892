"""The house stands: cli -> posttrain -> merging -> core, rooms without circles, nothing heavy before it is needed.

A room is a folder; a module belongs to the room of its folder. Every import counts, also those inside functions and
those for type checkers only: a circle between rooms is a circle for the reader, whenever Python runs it.
"""

import ast
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
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
    "posttrain.launch.starting",
    "posttrain.runs.run_directory",
    "posttrain.planning.estimates",
    "posttrain.runs.commands",
    "posttrain.pipelines.run",
    "posttrain.recipe_files.machines",
    "posttrain.recipe_files.settings_check",
    "posttrain.recipe_files.json_schema",
    "posttrain.watch.following",
    "posttrain.watch.page_server",
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


def room_of(module: str) -> str:
    """The folder that a module lies in; a package's __init__ lies in the package."""
    return module.rpartition(".")[0]


def modules_imported(everything: bool = True) -> dict[str, set[str]]:
    """Module -> the modules of the project that its imports name, without the packages that Python runs on the way.

    The face of a layer (`merging/__init__.py`) only hands on what lies inside, so it is left out as an importer.
    """
    faces = {f"{layer}.__init__" for layer in LAYERS}
    graph = {}
    for name, path in MODULES.items():
        found = {named(imported) for imported in imports(path, everywhere=everything)} - {name, None, *faces}
        graph[name] = set() if name in faces else {target for target in found if target}
    return graph


def named(imported: str) -> str | None:
    """The module, or the __init__ of the package, that an import names: the longest part of it that is one."""
    parts = imported.split(".")[1:] if imported.startswith("gemma2.") else []
    for end in range(len(parts), 0, -1):
        for module in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if module in MODULES:
                return module
    return None


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of the graph, as text, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def rooms_entered(modules: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Room -> the other rooms that its modules import from."""
    graph: dict[str, set[str]] = {}
    for module, targets in modules.items():
        graph.setdefault(room_of(module), set()).update(map(room_of, targets))
    return {room: targets - {room} for room, targets in graph.items()}


def test_no_circle_leads_through_rooms():
    assert circles(rooms_entered(modules_imported())) == []


def test_no_circle_leads_through_modules():
    assert circles(modules_imported()) == []


def test_a_circle_of_rooms_is_seen_where_no_module_is_in_one():
    modules = {"a.one": {"b.one"}, "b.two": {"a.two"}, "a.two": set(), "b.one": set()}
    assert circles(modules) == []
    assert circles(rooms_entered(modules)) in (["a -> b -> a"], ["b -> a -> b"])


# What a layer shows to those above without a room between: all else lies in a room that says what it holds.
FACES = {
    "cli": {"app", "main"},
    "posttrain": set(),
    "merging": {"engine"},
    "core": {
        *("errors", "home", "interrupts", "progress", "yaml_files", "json_files", "ranks", "rounding", "sizes"),
        *("limits", "permissions", "secret_text", "shown", "streams"),
    },
    "configs": set(),
}


def test_no_module_lies_loose_beside_rooms():
    loose = {layer: {path.stem for path in (ROOT / layer).glob("*.py")} - {"__init__"} for layer in LAYERS}
    assert {layer: names - FACES[layer] for layer, names in loose.items()} == {layer: set() for layer in LAYERS}


def test_no_room_holds_more_than_14_modules():
    held = Counter(room_of(name) for name in MODULES if not name.endswith(".__init__"))
    assert {room: count for room, count in held.items() if count > 14} == {}


def test_a_class_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


# A command has one name: its schema, its room's entry and its page are files of that name.
COMMAND_FILES = {"config", "convert", "distill", "evaluate", "filter", "generate", "lineage", "merge", "pareto", "pick"}
COMMAND_FILES |= {"pipeline", "quickstart", "reward", "rlhf", "sft", "warp"}


def test_a_module_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for name in MODULES:
        places.setdefault(name.rpartition(".")[2], []).append(name)
    several = {name: where for name, where in places.items() if len(where) > 1}
    assert several.keys() - COMMAND_FILES - {"__init__"} == set()


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


def test_no_file_is_over_400_lines_no_function_over_80_and_none_has_over_8_parameters():
    def long(module: str, path: Path) -> Iterator[str]:
        if len(path.read_text(encoding="utf-8").splitlines()) > 400:
            yield "the file"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                taken = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if node.end_lineno - node.lineno >= 80:
                    yield node.name
                if len(set(taken) - {"self", "cls"}) > 8 and not module.startswith("cli."):  # there a flag is one
                    yield f"{node.name} takes {len(taken)}"

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
    assert heavy_after(PAGES, "", *COMMANDS, "merge slerp", "reward pairs", "recipes list", "config check") == []


def test_the_modules_that_start_up_needs_are_torch_free():
    assert heavy_after(FREE, *TORCH_FREE) == []
