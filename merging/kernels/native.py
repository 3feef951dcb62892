"""Kernels: Python functions that run as machine code, without the GIL. numba compiles them, and is not needed later.

Importing numba and loading a kernel from its cache takes half a second of processor time, as long as merging small
models. So the machine code of each kernel and types of arguments is kept as an object file, which LLVM loads in
milliseconds, next to the bytecode of its source, else in the user's cache (~/.cache/gemma2/kernels):

    NAME-KIND-SOURCE.o    DIGEST of the rest, SYMBOL, kind of RESULT, each on a line; then the object
    KIND      BLAKE3 of the types, the options, the processor, and the versions of the compilers
    SOURCE    BLAKE3 of the kernels' sources; a file with another one is removed when the kernel is compiled again

A file that is missing or damaged is compiled again. If no place can be written to, each process compiles for itself. A
kernel that allocates memory or whose arguments are of other types runs through numba.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property, update_wrapper
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import numpy as np

from gemma2.core.home import cache_folder

from .machine_code import Argument, Entry, MachineCode, llvm, load_code, short_digest

if TYPE_CHECKING:
    from .compiler import Dispatcher

__all__ = ["Kernel", "announced", "compiled", "form_of", "in_kernels"]

P = ParamSpec("P")
R = TypeVar("R")
_LOCK = RLock()
_NOTES: list[Callable[[str], None]] = []
_FORMS: list[tuple[Callable[..., object], Callable[..., object], dict[str, object]]] = []


class Kernel(Generic[P, R]):
    """A function that runs as machine code. It takes C-contiguous arrays, numbers and tuples, and returns a number."""

    def __init__(self, function: Callable[P, R], options: dict[str, object]) -> None:
        update_wrapper(self, function)
        self.function = function
        self.options = options
        self._entries: dict[str, Entry | None] = {}

    @cached_property
    def dispatcher(self) -> Dispatcher:
        """The function as numba compiles it into other kernels; imports numba."""
        found: Dispatcher = _compiler().dispatcher_of(self)
        return found

    @cached_property
    def _through_numba(self) -> Dispatcher:
        with _LOCK:
            found: Dispatcher = _compiler().dispatcher_of(self, called=True)
        return found

    def __call__(self, *args: P.args, **_: P.kwargs) -> R:
        types: list[str] = []
        flat: list[Argument] = []
        if all([_flatten(value, types, flat) for value in args]):
            key = " ".join(types)
            if key not in self._entries:
                with _LOCK:
                    if key not in self._entries:
                        self._entries[key] = self._entry(types)
            entry = self._entries[key]
            if entry is not None:
                return entry(flat)  # type: ignore[return-value]
        return self._through_numba(*args)  # type: ignore[return-value]

    def references(self) -> dict[str, AnyKernel]:
        """Return the kernels that this one calls, by the name that it has for them."""
        scope = self.function.__globals__
        return {name: scope[name] for name in self.function.__code__.co_names if isinstance(scope.get(name), Kernel)}

    def _entry(self, types: list[str]) -> Entry | None:
        """Return the machine code for these types of arguments; None if numba has to run it."""
        kind, source = _names(self, types)
        places = _places(self)
        code = _found(places, f"{kind}-{source}.o")
        if code is None:
            for note in _NOTES:
                note("compiling the merge kernels (once per machine, a few seconds)")
            _NOTES.clear()
            code = _compiler().machine_code(self, types)
            _keep(places, kind, source, code)
        return load_code(code, types) if code.content else None


AnyKernel = Kernel[Any, Any]


def compiled(**options: object) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a function a kernel, which Python and other kernels can call.

    options  of `numba.njit`
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        return Kernel(function, options)

    return decorate


def in_kernels(kernel: object) -> Dispatcher:
    """Return a kernel as other kernels call it, for `form_of`."""
    if not isinstance(kernel, Kernel):
        raise TypeError(f"{kernel!r} is not a kernel")
    return kernel.dispatcher


def form_of(function: Callable[..., object], **options: object) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for what returns the form that compiled code has of a function, for given numba types.

    options  of `numba.extending.overload`
    """

    def decorate(choose: Callable[P, R]) -> Callable[P, R]:
        _FORMS.append((function, choose, options))
        return choose

    return decorate


@cache
def _compiler() -> ModuleType:
    """Return the module that compiles, with numba, after the forms of functions are known to it."""
    from . import compiler

    compiler.register(_FORMS)
    return compiler


@contextmanager
def announced(note: Callable[[str], None]) -> Iterator[None]:
    """Within the block, the first compilation is announced in one line."""
    _NOTES.append(note)
    try:
        yield
    finally:
        with suppress(ValueError):
            _NOTES.remove(note)


def _flatten(value: object, types: list[str], flat: list[Argument]) -> bool:
    """Append the types and plain numbers of an argument; False for one that only numba can take."""
    if isinstance(value, np.ndarray):
        types.append(f"{value.dtype.str}{value.ndim}")
        flat.append(value.__array_interface__["data"][0])
        flat.extend(value.shape)
        return value.flags.c_contiguous
    if isinstance(value, tuple):
        types.append("(")
        found = all([_flatten(item, types, flat) for item in value])
        types.append(")")
        return found
    for kind, classes in (("b", (bool, np.bool_)), ("s", np.float32), ("u", np.uint64), ("i", (int, np.integer))):
        if isinstance(value, classes):
            types.append(kind)
            flat.append(float(value) if kind == "s" else int(value))
            return True
    types.append("f")
    flat.append(float(value) if isinstance(value, (float, np.floating)) else 0.0)
    return isinstance(value, (float, np.floating))


# --- the cache --------------------------------------------------------------------------------------------------------


def _names(kernel: AnyKernel, types: list[str]) -> tuple[str, str]:
    """Return both parts of the name of a file, NAME-KIND and SOURCE."""
    decides = types, sorted(kernel.options.items(), key=str), _machine()
    return f"{kernel.function.__name__}-{short_digest(repr(decides).encode())}", short_digest(
        repr(_sources(kernel)).encode()
    )


def _places(kernel: AnyKernel) -> list[Path]:
    """Return the folders that may hold the machine code of a kernel, the first to be preferred."""
    bytecode = Path(cache_from_source(kernel.function.__code__.co_filename)).parent
    return [bytecode, cache_folder("kernels")]


def _found(places: list[Path], name: str) -> MachineCode | None:
    for place in places:
        with suppress(OSError):
            code = MachineCode.decoded((place / name).read_bytes())
            if code is not None:
                return code
    return None


def _sources(kernel: AnyKernel) -> list[str]:
    """Return digests of the modules of a kernel and of all kernels that it calls, and of the compiler's."""
    found: set[str] = set()
    todo, seen = [kernel], set[int]()
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen.add(id(one))
            found.add(one.function.__code__.co_filename)
            todo += one.references().values()
    folder = Path(__file__).parent
    found |= {str(folder / name) for name in ("compiler.py", "dtypes.py", "machine_code.py", "native.py")}
    return sorted(map(_source, found))


@cache
def _source(path: str) -> str:
    try:
        return short_digest(Path(path).read_bytes())
    except OSError:  # no source: the kernel is compiled in each process
        return f"{path} {os.getpid()}"


@cache
def _machine() -> tuple[str, ...]:
    """Return the processor and the versions of the compilers."""
    binding = llvm()
    features = binding.get_host_cpu_features().flatten()
    return sys.platform, binding.get_host_cpu_name(), features, version("numba"), version("llvmlite"), np.__version__


def _keep(places: list[Path], kind: str, source: str, code: MachineCode) -> None:
    """Write the file of a kernel into the first place that takes it, in one rename; remove those of older sources."""
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            aside = place / f"{kind}-{source}.o.{os.getpid()}"
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with open(descriptor, "wb") as file:
                file.write(code.encoded())
            aside.replace(place / f"{kind}-{source}.o")
            for old in place.glob(f"{kind}-*.o"):
                if old.name != f"{kind}-{source}.o":
                    old.unlink()
            return
