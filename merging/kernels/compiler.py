"""Compiles kernels with numba, to machine code with an entry that takes addresses, lengths and numbers only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, Protocol

import numpy as np
from llvmlite import binding
from numba import carray, cfunc, njit, types
from numba.extending import overload
from numba.np.numpy_support import from_dtype

from .machine_code import ERROR_PATH, External, MachineCode, target_machine

__all__ = ["Dispatcher", "dispatcher_of", "machine_code"]


class Dispatcher(Protocol):
    """A function of numba."""

    overloads: dict[tuple[types.Type, ...], Any]  # by types of arguments

    def __call__(self, *args: object) -> object:
        """Run it."""
        ...

    def compile(self, signature: tuple[types.Type, ...]) -> object:
        """Compile it for these types of arguments."""
        ...


SCALARS = {"b": types.boolean, "i": types.int64, "u": types.uint64, "f": types.float64, "s": types.float32}
RESULTS = {types.none: "n", types.boolean: "b", types.int64: "i", types.uint64: "u", types.float64: "f"}
ONLY_NUMBA = MachineCode(b"", "", "n")
RETURNED = {kind: returned for returned, kind in RESULTS.items()} | {"n": types.void}


class Compilable(Protocol):
    """What is known of a kernel here (`native.Kernel`)."""

    function: FunctionType
    options: dict[str, Any]
    dispatcher: Dispatcher

    def references(self) -> Mapping[str, Compilable]:
        """The kernels that it calls."""
        ...


def register(forms: Iterable[tuple[Callable[..., object], Callable[..., object], dict[str, object]]]) -> None:
    """Tell numba the forms of functions (`native.form_of`)."""
    for function, choose, options in forms:
        overload(function, strict=False, **options)(choose)


def dispatcher_of(kernel: Compilable, called: bool = False) -> Dispatcher:
    """Return the function of a kernel as numba compiles it: with the kernels and system calls that it calls.

    called  by Python, not by other kernels: with numba's cache
    """
    function = kernel.function
    scope = {**function.__globals__, **{name: one.dispatcher for name, one in kernel.references().items()}}
    scope |= {name: _external(one) for name, one in scope.items() if isinstance(one, External)}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    if not called:
        wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        return njit(copy, nogil=True, **wrappers, **kernel.options)  # type: ignore[no-any-return]
    try:
        return njit(copy, nogil=True, cache=True, **kernel.options)  # type: ignore[no-any-return]
    except RuntimeError:  # numba: "no locator available"
        return njit(copy, nogil=True, **kernel.options)  # type: ignore[no-any-return]


def _external(one: External) -> types.ExternalFunction:
    arguments = [getattr(types, name) for name in one.arguments]
    return types.ExternalFunction(one.name, getattr(types, one.result)(*arguments))


def machine_code(kernel: Compilable, kinds: Sequence[str]) -> MachineCode:
    """Return the code of a kernel for arguments of these kinds (`native._flatten`); empty if only numba can run it."""
    call = _Call()
    values, known = call.take(iter(kinds))
    inner = kernel.dispatcher
    inner.compile(known)
    result = RESULTS.get(inner.overloads[known].signature.return_type)
    if result is None:
        return ONLY_NUMBA
    scope: dict[str, Any] = {"carray": carray, "inner": inner}
    exec(f"def entry({', '.join(call.names)}):\n    return inner({', '.join(values)})", scope)
    entry = cfunc(RETURNED[result](*call.types), nopython=True)(scope["entry"])
    text = entry.inspect_llvm()
    declared = set(re.findall(r"^declare [^@]*@\"?([\w.]+)\"?\(", text, re.MULTILINE))
    if any(name.startswith(("NRT_", "numba_", "__svml")) for name in declared - {*ERROR_PATH}):
        return ONLY_NUMBA  # it allocates, or needs another part of numba
    module = binding.parse_assembly(text)
    return MachineCode(target_machine().emit_object(module), entry.native_name, result)


class _Call:
    """The parameters of an entry, and the arguments of the kernel that are made of them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.types: list[types.Type] = []

    def take(self, kinds: Iterator[str]) -> tuple[list[str], tuple[types.Type, ...]]:
        """Return an expression and the type of each argument, up to the end of a tuple."""
        values: list[str] = []
        known: list[types.Type] = []
        for kind in kinds:
            if kind == ")":
                break
            if kind == "(":
                inside, held = self.take(kinds)
                values.append(f"({', '.join(inside)},)")
                known.append(types.Tuple(held))
            elif kind in SCALARS:
                values.append(self._parameter(SCALARS[kind]))
                known.append(SCALARS[kind])
            else:
                dtype = from_dtype(np.dtype(kind[:-1]))
                start = self._parameter(types.CPointer(dtype))
                shape = [self._parameter(types.int64) for _ in range(int(kind[-1]))]
                values.append(f"carray({start}, ({', '.join(shape)},))")
                known.append(types.Array(dtype, int(kind[-1]), "C"))
        return values, tuple(known)

    def _parameter(self, kind: types.Type) -> str:
        self.types.append(kind)
        self.names.append(f"p{len(self.names)}")
        return self.names[-1]
