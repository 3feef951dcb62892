"""Where the fields of the schemas are read, found in the source by the types of its annotations; nothing is imported.

A read is `X.field`, or `getattr(X, name)` with names that are written out, where the type of X names a schema. Types
come from annotations of parameters, attributes and return values, from assignments and loops, and from
`isinstance(X, Schema)`. A container has the types of its items, and an alternative those of both sides: a type here is
a set of class names. Validators of a schema do not count, since a validator that looks at a field does not use it; the
other methods and properties of a schema do, and so do the places where they are called.

`field_reads.txt` holds what is agreed on; `python tests/posttrain/schemas/field_reads.py` writes it anew.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FROZEN = Path(__file__).with_suffix(".txt")
LAYERS = ("cli", "posttrain", "merging")
SCHEMAS = "posttrain.schemas."
Types = frozenset[str]
NOTHING: Types = frozenset()
# Calls whose result has the types of their arguments.
PASSES_ON = {"list", "tuple", "set", "sorted", "dict", "enumerate", "zip", "iter", "next", "map", "filter", "reversed"}
PASSES_ON |= {"min", "max", "replace", "copy", "deepcopy", "islice", "chain", "cast"}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
BINDS = ast.Assign | ast.AnnAssign | ast.For | ast.comprehension | ast.NamedExpr | ast.withitem | ast.Call
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass
class Class:
    """A class of the source: the types of its attributes and of what its methods and properties return."""

    name: str
    bases: tuple[str, ...] = ()
    attributes: dict[str, Types] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)  # what an annotation of the class declares
    methods: dict[str, FUNCTION] = field(default_factory=dict)


@dataclass
class Module:
    """A file: its names, and what they stand for as `module.name`."""

    name: str
    tree: ast.Module
    names: dict[str, str] = field(default_factory=dict)
    values: dict[str, ast.expr] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """`schema.field`, read in `place` (module:function)."""

    schema: str
    field: str
    place: str


class Source:
    """All modules below the root, and every read of a schema in them."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, Module] = {}
        self.classes: dict[str, Class] = {}
        self.functions: dict[str, tuple[Module, FUNCTION]] = {}
        for layer in LAYERS:
            for path in sorted((root / layer).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                text = path.read_text(encoding="utf-8")
                if layer != "posttrain" and "schemas" not in text:
                    continue  # no schema comes there
                module = Module(name, ast.parse(text))
                self.modules[name] = module
                self._name(module, is_package=parts[-1] == "__init__")
        for module in self.modules.values():
            self._declare(module)
        self.reads: Counter[Read] = Counter()
        for counts in (False, True):  # the second pass knows the attributes that the first one found
            self.counts = counts
            for module in self.modules.values():
                self._walk(module)

    # --- names --------------------------------------------------------------------------------------------------------

    def _name(self, module: Module, is_package: bool) -> None:
        here = module.name.split(".")
        nodes = list(ast.walk(module.tree))
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                base = here[: len(here) - node.level + is_package] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])]).removeprefix("gemma2.")
                for item in node.names:
                    module.names[item.asname or item.name] = f"{origin}.{item.name}"
        for node in nodes:
            if isinstance(node, ast.ClassDef | FUNCTION) and node.name not in module.names:
                module.names[node.name] = f"{module.name}.{node.name}"
        for node in module.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(value, ast.expr):
                    module.names.setdefault(target.id, f"{module.name}.{target.id}")
                    module.values[target.id] = value

    def full(self, module: Module, name: str) -> str:
        """The home of a name, through re-exports."""
        found = module.names.get(name, "")
        for _ in range(4):
            home, _, last = found.rpartition(".")
            other = self.modules.get(home)
            if other is None or other.names.get(last, found) == found:
                break
            found = other.names[last]
        return found

    def _declare(self, module: Module) -> None:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                known = self.classes.setdefault(f"{module.name}.{node.name}", Class(f"{module.name}.{node.name}"))
                known.bases = tuple(self.full(module, base.id) for base in node.bases if isinstance(base, ast.Name))
                known.methods |= {item.name: item for item in node.body if isinstance(item, FUNCTION)}
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        known.own |= set() if "ClassVar" in ast.unparse(item.annotation) else {item.target.id}
        for node in module.tree.body:
            if isinstance(node, FUNCTION):
                self.functions[f"{module.name}.{node.name}"] = (module, node)

    def annotated(self, module: Module, node: ast.expr | None) -> Types:
        """The classes that an annotation names."""
        if node is None:
            return NOTHING
        found: set[str] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                try:
                    found |= self.annotated(module, ast.parse(part.value, mode="eval").body)
                except SyntaxError:
                    continue  # a value of Literal
            elif isinstance(part, ast.Name):
                full = self.full(module, part.id)
                if full in self.classes:
                    found |= {full, *self.fitting(full)}
                else:
                    found |= self._bound(full)
        return frozenset(found)

    def _bound(self, full: str) -> Types:
        """The bound of a type variable, or what an alias of a type names."""
        home, _, name = full.rpartition(".")
        value = self.modules[home].values.get(name) if home in self.modules else None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "TypeVar":
            bounds = [word.value for word in value.keywords if word.arg == "bound"]
            return self.annotated(self.modules[home], bounds[0]) if bounds else NOTHING
        if isinstance(value, ast.Subscript | ast.BinOp):
            return self.annotated(self.modules[home], value)
        return NOTHING

    # --- classes ------------------------------------------------------------------------------------------------------

    def ancestry(self, name: str) -> Iterator[Class]:
        """A class of the source and its bases."""
        known = self.classes.get(name)
        if known is not None:
            yield known
            for base in known.bases:
                yield from self.ancestry(base)

    @cache  # noqa: B019  one instance lives as long as the tests
    def below(self, name: str) -> Types:
        """A class and every one derived from it."""
        return frozenset(other for other in self.classes if any(c.name == name for c in self.ancestry(other)))

    @cache  # noqa: B019
    def fitting(self, name: str) -> Types:
        """The schemas that have all that a Protocol asks for; none for another class."""
        asked = self.classes[name]
        wanted = asked.own | set(asked.methods)
        if "typing.Protocol" not in asked.bases:
            return NOTHING
        return frozenset(
            other
            for other in self.classes
            if other.startswith(SCHEMAS) and all(self.declares(other, w) for w in wanted)
        )

    def declares(self, name: str, attribute: str) -> bool:
        """Whether a schema has this field, or a method or property of this name."""
        return any(attribute in known.own or attribute in known.methods for known in self.ancestry(name))

    # --- reads --------------------------------------------------------------------------------------------------------

    def _walk(self, module: Module) -> None:
        def inside(nodes: list[ast.stmt], owner: str, scope: str) -> None:
            for node in nodes:
                if isinstance(node, ast.ClassDef):
                    full = f"{module.name}.{node.name}"
                    for item in node.body:
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                            self.classes[full].attributes[item.target.id] = self.annotated(module, item.annotation)
                    inside(node.body, full, f"{node.name}.")
                elif isinstance(node, FUNCTION):
                    _Function(self, module, owner, f"{module.name}:{scope}{node.name}", node).walk({})
                elif isinstance(node, ast.If):
                    inside([*node.body, *node.orelse], owner, scope)

        inside(module.tree.body, "", "")

    def strings(self, module: Module, node: ast.AST, seen: frozenset[str] = frozenset()) -> set[str]:
        """The strings written out in an expression, and in the constants that it names."""
        found: set[str] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                found.add(part.value)
            elif isinstance(part, ast.Name) and part.id not in seen:
                home, _, name = self.full(module, part.id).rpartition(".")
                value = self.modules[home].values.get(name) if home in self.modules else None
                if value is not None:
                    found |= self.strings(self.modules[home], value, seen | {part.id})
        return found


@cache
def _own_nodes(function: Function) -> tuple[list[ast.AST], list[Function]]:
    """The nodes of a function outside the functions in it, and these."""
    mine: list[ast.AST] = []
    nested: list[Function] = []
    left: list[ast.AST] = list(function.body) if isinstance(function.body, list) else [function.body]
    while left:
        node = left.pop()
        if isinstance(node, Function):
            nested.append(node)
            continue
        mine.append(node)
        left += ast.iter_child_nodes(node)
    return mine, nested


class _Function:
    """One function: the types of its names, and its reads."""

    def __init__(self, source: Source, module: Module, owner: str, place: str, node: Function):
        self.source, self.module, self.owner, self.place, self.node = source, module, owner, place, node
        self.types: dict[str, Types] = {}
        self.items: dict[str, list[ast.expr]] = {}  # name -> what it is drawn from, for `getattr(X, name)`

    def walk(self, outer: dict[str, Types]) -> None:
        if any("validator" in ast.unparse(item) for item in getattr(self.node, "decorator_list", ())):
            return
        self.types = dict(outer)
        arguments = self.node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            self.types[argument.arg] = self.source.annotated(self.module, argument.annotation)
        first = arguments.args[0].arg if arguments.args else ""
        if self.owner and first in ("self", "cls"):
            self.types[first] = self.source.below(self.owner)
        mine, nested = _own_nodes(self.node)
        binding = [node for node in mine if isinstance(node, BINDS)]
        for _ in range(3):  # until a chain of assignments is followed
            for node in binding:
                self._assign(node)
        for node in mine if self.source.counts else ():
            self._read(node)
        for inner in nested:
            _Function(self.source, self.module, "", self.place, inner).walk(self.types)

    def _assign(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value)
            case ast.AnnAssign(target=target, annotation=annotation):
                self._add(target, self.source.annotated(self.module, annotation))
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                self._bind(target, value)
            case ast.NamedExpr(target=target, value=value):
                self._bind(target, value)
            case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
                self._bind(target, value)
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id=name), kinds]):
                self.types[name] = self.types.get(name, NOTHING) | self.source.annotated(self.module, kinds)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs = list(zip(target.elts, value.elts, strict=True))
        for one, its in pairs:
            self._add(one, self.of(its))
            for name in ast.walk(one):
                if isinstance(name, ast.Name):
                    self.items.setdefault(name.id, []).append(its)

    def _add(self, target: ast.expr, types: Types) -> None:
        match target:
            case ast.Name(id=name):
                self.types[name] = self.types.get(name, NOTHING) | types
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._add(part, types)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if self.owner:
                known = self.source.classes[self.owner].attributes
                known[name] = known.get(name, NOTHING) | types

    def of(self, node: ast.expr) -> Types:
        """The types of an expression."""
        match node:
            case ast.Name(id=name):
                if name in self.types:
                    return self.types[name]
                full = self.source.full(self.module, name)
                return frozenset([full]) if full in self.source.classes else NOTHING
            case ast.Attribute(value=value, attr=attr):
                return self._attribute(self.of(value), attr)
            case ast.Call():
                return self._call(node)
            case ast.ListComp(elt=value) | ast.SetComp(elt=value) | ast.GeneratorExp(elt=value):
                return self.of(value)
            case ast.DictComp(value=value) | ast.Subscript(value=value) | ast.Starred(value=value):
                return self.of(value)
            case ast.NamedExpr(value=value):
                return self.of(value)
            case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
                return self.of(one) | self.of(other)
            case ast.BoolOp(values=values) | ast.Tuple(elts=values) | ast.List(elts=values) | ast.Dict(values=values):
                return NOTHING.union(*map(self.of, values))
        return NOTHING

    def _attribute(self, owners: Types, name: str) -> Types:
        found = NOTHING
        for owner in owners:
            for known in self.source.ancestry(owner):
                if known.attributes.get(name):  # the type that a class gives an attribute hides that of its base
                    found |= known.attributes[name]
                    break
                if name in known.methods:
                    home = self.source.modules[known.name.rpartition(".")[0]]
                    returned = known.methods[name].returns
                    found |= self.source.annotated(home, returned)
                    if returned is not None and ast.unparse(returned) == "Self":
                        found |= {owner}
        return found

    def _call(self, node: ast.Call) -> Types:
        given = NOTHING.union(*(self.of(item) for item in [*node.args, *(word.value for word in node.keywords)]))
        if isinstance(node.func, ast.Name):
            if node.func.id in PASSES_ON:
                return given
            full = self.source.full(self.module, node.func.id)
            if full in self.source.classes:
                return frozenset([full])
            if full in self.source.functions:
                home, function = self.source.functions[full]
                types = self.source.annotated(home, function.returns)
                generic = any(self._is_variable(home, name) for name in ast.walk(function.returns or ast.Pass()))
                return types | given if generic else types
            return self.types.get(node.func.id, NOTHING) if node.func.id == "cls" else NOTHING
        if isinstance(node.func, ast.Attribute):
            owners = self.of(node.func.value)
            returned = self._attribute(owners, node.func.attr)
            # `copies.items()`, `config.model_copy()`, `schema.model_validate()`: the types of what it is called on.
            return returned or owners
        return NOTHING

    def _is_variable(self, home: Module, node: ast.AST) -> bool:
        if not isinstance(node, ast.Name):
            return False
        place, _, name = self.source.full(home, node.id).rpartition(".")
        value = self.source.modules[place].values.get(name) if place in self.source.modules else None
        return isinstance(value, ast.Call) and ast.unparse(value.func) == "TypeVar"

    def _read(self, node: ast.AST) -> None:
        match node:
            case ast.Attribute(value=value, attr=attr, ctx=ast.Load()):
                self._count(self.of(value), {attr})
            case ast.Call(func=ast.Name(id="getattr"), args=[value, names, *_]):
                self._count(self.of(value), self._named(names))

    def _named(self, node: ast.expr) -> set[str]:
        """The names that an expression may stand for."""
        match node:
            case ast.JoinedStr(values=parts):
                found = {""}
                for part in parts:
                    inner = part.value if isinstance(part, ast.FormattedValue) else part
                    found = {left + right for left in found for right in self._named(inner)}
                return found
            case ast.Name(id=name) if name in self.items:
                return {text for value in self.items[name] for text in self._drawn(value)}
        return self.source.strings(self.module, node)

    def _drawn(self, node: ast.expr) -> set[str]:
        """The strings of what a name is drawn from, through local names."""
        found = self.source.strings(self.module, node)
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in self.items:
                found |= {text for value in self.items[part.id] for text in self.source.strings(self.module, value)}
        return found

    def _count(self, types: Types, names: set[str]) -> None:
        schemas = {name for name in types if name.startswith(SCHEMAS)}
        # `self` of a base may be any class below it; the read belongs to the highest one that has the field.
        for attribute in names:
            fit = {name for name in schemas if self.source.declares(name, attribute)}
            for name in fit:
                if not any(other != name and name in self.source.below(other) for other in fit):
                    self.source.reads[Read(name.rpartition(".")[2], attribute, self.place)] += 1


@cache
def source() -> Source:
    """The source that the tests run on."""
    return Source(ROOT)


@cache
def table() -> dict[str, int]:
    """`Schema.field module:function` -> how often it is read there, in order."""
    found = {f"{read.schema}.{read.field} {read.place}": count for read, count in source().reads.items()}
    return dict(sorted(found.items()))


@cache
def frozen() -> dict[str, int]:
    """The table that was agreed on."""
    lines = (line.rsplit(" ", 1) for line in FROZEN.read_text(encoding="utf-8").splitlines())
    return {what: int(count) for what, count in lines}


if __name__ == "__main__":
    FROZEN.write_text("".join(f"{what} {count}\n" for what, count in table().items()), encoding="utf-8")
