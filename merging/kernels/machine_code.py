"""Machine code of kernels: an object file, its form on disk, and its loading by LLVM. Without numba."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

from gemma2.core.outputs.hashing import hasher

__all__ = [
    "ERROR_PATH",
    "Argument",
    "Entry",
    "External",
    "MachineCode",
    "llvm",
    "load_code",
    "short_digest",
    "target_machine",
]

Argument = int | float
Entry = Callable[[Sequence[Argument]], object]

RESULTS = {"n": None, "b": ctypes.c_bool, "i": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_double}
SCALARS = {"b": ctypes.c_bool, "i": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_double, "s": ctypes.c_float}
# Symbols of numba's error path, which no kernel takes: reaching one ends the process.
ERROR_PATH = (
    *("numba_gil_ensure", "numba_gil_release", "numba_do_raise", "numba_unpickle"),
    *("numba_runtime_build_excinfo_struct", "NRT_Free", "NRT_MemInfo_call_dtor"),
)


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
        return short_digest(rest).encode() + b"\n" + rest

    @classmethod
    def decoded(cls, text: bytes) -> MachineCode | None:
        """Return the code in a file of the cache; None if it is damaged."""
        digest, _, rest = text.partition(b"\n")
        if digest.decode("ascii", "replace") != short_digest(rest):
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


def short_digest(data: bytes) -> str:
    """Return 24 hexadecimal digits of the BLAKE3 digest."""
    found = hasher()
    found.update(data)
    return found.hexdigest()[:24]


_ENGINES: list[object] = []  # machine code lives as long as its engine


@cache
def llvm() -> ModuleType:
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
    binding = llvm()
    found: TargetMachine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )
    return found


def load_code(code: MachineCode, types: Sequence[str]) -> Entry:
    """Return a function that runs the code on plain numbers: addresses and lengths of arrays, and scalars."""
    binding = llvm()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code.content))
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
