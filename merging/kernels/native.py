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

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, update_wrapper
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

import numpy as np

from gemma2.core.outputs.hashing import hasher
from gemma2.core.outputs.home import cache_folder

if TYPE_CHECKING:
    from .compiler import Dispatcher

__all__ = ["External", "Kernel", "MachineCode", "announced", "compiled", "target_machine"]

P = ParamSpec("P")
R = TypeVar("R")
Argument = int | float
Entry = Callable[[Sequence[Argument]], object]

RESULTS = {"n": None, "b": ctypes.c_bool, "i": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_double}
SCALARS = {"b": ctypes.c_bool, "i": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_double, "s": ctypes.c_float}
# Symbols of numba's error path, which no kernel takes: reaching one ends the process.
ERROR_PATH = (
    *("numba_gil_ensure", "numba_gil_release", "numba_do_raise", "numba_unpickle"),
    *("numba_runtime_build_excinfo_struct", "NRT_Free", "NRT_MemInfo_call_dtor"),
)
_LOCK = RLock()
_NOTES: list[Callable[[str], None]] = []


class MachineCode:
    """One compiled kernel.

    content  object file; empty if only numba can run the kernel
    symbol   name of its entry
    result   kind of its result, a key of RESULTS
    """

    def __init__(self, content: bytes, symbol: str, result: str) -> None:
        self.content = content
        self.symbol = symbol
        self.result = result

    def encoded(self) -> bytes:
        """Return the content of a file of the cache."""
        rest = f"{self.symbol}\n{self.result}\n".encode() + self.content
        return _digest(rest).encode() + b"\n" + rest

    @classmethod
    def decoded(cls, text: bytes) -> MachineCode | None:
        """Return the code in a file of the cache; None if it is damaged."""
        digest, _, rest = text.partition(b"\n")
        if digest.decode("ascii", "replace") != _digest(rest):
            return None
        symbol, result, content = rest.split(b"\n", 2)
        return cls(content, symbol.decode(), result.decode())


@dataclass(frozen=True)
class External:
    """A function of the C library that kernels call; its types by the names that numba has for them."""

    name: str
    result: str
    arguments: tuple[str, ...]

    def __call__(self, *_: object) -> int:
        raise NotImplementedError("for compiled code")


class Kernel(Generic[P, R]):
    """A function that runs as machine code. It takes C-contiguous arrays, numbers and tuples, and returns a number."""

    def __init__(self, function: Callable[P, R], inner: bool, options: dict[str, object]) -> None:
        update_wrapper(self, function)
        self.function = function
        self.inner = inner
        self.options = options
        self._entries: dict[str, Entry | None] = {}

    @cached_property
    def dispatcher(self) -> Dispatcher:
        """The function as numba compiles it into other kernels; imports numba."""
        from .compiler import dispatcher_of

        return dispatcher_of(self)

    @cached_property
    def _through_numba(self) -> Dispatcher:
        from .compiler import dispatcher_of

        with _LOCK:
            return dispatcher_of(self, called=True)

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
            from .compiler import machine_code

            for note in _NOTES:
                note("compiling the merge kernels (once per machine, a few seconds)")
            _NOTES.clear()
            code = machine_code(self, types)
            _keep(places, kind, source, code)
        return _loaded(code, types) if code.content else None


AnyKernel = Kernel[Any, Any]


def compiled(inner: bool = False, **options: object) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a function a kernel. Kernels that are `inner` are called by other kernels only.

    options  of `numba.njit`
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        return Kernel(function, inner, options)

    return decorate


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
    return f"{kernel.function.__name__}-{_digest(repr(decides).encode())}", _digest(repr(_sources(kernel)).encode())


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
    found |= {str(folder / name) for name in ("compiler.py", "dtypes.py", "native.py")}
    return sorted(map(_source, found))


@cache
def _source(path: str) -> str:
    try:
        return _digest(Path(path).read_bytes())
    except OSError:  # no source: the kernel is compiled in each process
        return f"{path} {os.getpid()}"


@cache
def _machine() -> tuple[str, ...]:
    """Return the processor and the versions of the compilers."""
    llvm = _llvm()
    features = llvm.get_host_cpu_features().flatten()
    return sys.platform, llvm.get_host_cpu_name(), features, version("numba"), version("llvmlite"), np.__version__


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


def _digest(data: bytes) -> str:
    found = hasher()
    found.update(data)
    return found.hexdigest()[:24]


# --- loading ----------------------------------------------------------------------------------------------------------

_ENGINES: list[object] = []  # machine code lives as long as its engine


@cache
def _llvm() -> ModuleType:
    """Return LLVM, ready to load code for this machine."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for symbol in ERROR_PATH:
        if binding.address_of_symbol(symbol) is None:
            binding.add_symbol(symbol, abort)
    found: ModuleType = binding
    return found


class TargetMachine(Protocol):
    """LLVM's description of a machine."""

    def emit_object(self, module: object) -> bytes:
        """Return the object file of a module."""
        ...


def target_machine() -> TargetMachine:
    """Return LLVM's description of this machine, for code that is loaded at any address."""
    llvm = _llvm()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    found: TargetMachine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, codemodel="jitdefault", jit=True
    )
    return found


def _loaded(code: MachineCode, types: list[str]) -> Entry:
    llvm = _llvm()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code.content))
    engine.finalize_object()
    _ENGINES.append(engine)
    arguments = [kind for one in types for kind in _c_types(one)]
    call = ctypes.CFUNCTYPE(RESULTS[code.result], *arguments)(engine.get_function_address(code.symbol))
    return lambda flat: call(*flat)


def _c_types(one: str) -> list[type]:
    if one in "()":
        return []
    if one in SCALARS:
        return [SCALARS[one]]
    return [ctypes.c_void_p, *[ctypes.c_int64] * int(one[-1])]
