"""A device `sim:0` that computes on the CPU and refuses what an accelerator would refuse: tensors of two devices.

PyTorch lets a Python back end register as a device. Here a tensor of `sim:0` is a wrapper around a CPU tensor; every
operation on one is run on the CPU, unless another operand is a CPU tensor with dimensions: that raises, as CUDA does.
So a tensor that was left on the wrong device fails in a test on any machine. `install` changes the whole process.

What it does not simulate: kernels, their rounding and their speed, memory, streams, several devices that differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

DEVICES = 2  # visible, as on a machine with two GPUs
CPU = torch.device("cpu")
seen = SimpleNamespace(operations=0, waits=0)  # waits: values that the host asked the device for
# Copies go from one device to the other, and indices may lie on the CPU, as for CUDA.
BETWEEN_DEVICES = {
    aten.copy_.default,
    aten._copy_from.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# What makes the host wait: a value that it reads, or a shape that depends on values.
ASKED = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
# What autocast runs in half precision.
NARROWED = ("mm", "bmm", "addmm", "matmul", "linear", "baddbmm", "scaled_dot_product_attention")
kept: list[object] = []  # libraries of operators, which end with their objects


class SimulatedTensor(Tensor):
    """A tensor of `sim:0`; `raw` is the CPU tensor that has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimulatedTensor:
        form = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made: SimulatedTensor = Tensor._make_wrapper_subclass(cls, raw.size(), device=torch.device("sim", 0), **form)
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        if id(self) not in memo:
            copied = SimulatedTensor(self.raw.detach().clone())
            trained = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if trained else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> object:
        return self.raw.__reduce_ex__(protocol)  # as torch.save of another device, read with map_location="cpu"

    def storage(self) -> Any:
        return self.raw.storage()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        seen.waits += 1
        return self.raw.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert sim:0 device type tensor to numpy. Use Tensor.cpu() first")

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError("cannot pin a tensor of sim:0: only dense CPU tensors can be pinned")

    def __repr__(self) -> str:
        return f"sim({self.raw!r})"


def _raw(value: Any) -> Any:
    if isinstance(value, SimulatedTensor):
        return value.raw
    return CPU if isinstance(value, torch.device) and value.type == "sim" else value


def _simulated(value: Any) -> Any:
    return SimulatedTensor(value) if isinstance(value, Tensor) and not isinstance(value, SimulatedTensor) else value


def run(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run one operation of the device: on the CPU, with what it may not mix refused."""
    seen.operations += 1
    seen.waits += operation in ASKED
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = [value for value in tensors if isinstance(value, SimulatedTensor)]
    if ours and operation not in BETWEEN_DEVICES:
        for tensor in tensors:
            if not isinstance(tensor, SimulatedTensor) and tensor.dim():
                raise RuntimeError(f"{operation}: Expected all tensors to be on the same device, found cpu and sim:0")
    if operation is aten.mm.dtype:  # half precision with a wide result, which a CPU does not have
        left, right, dtype = args
        return SimulatedTensor(_raw(left).to(dtype) @ _raw(right).to(dtype))
    found = operation(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if any(value.raw.shape != value.shape for value in ours):
        raise RuntimeError(f"{operation} resized a tensor of sim:0, which the simulation cannot show")
    if operation is aten._to_copy.default and torch.device(kwargs.get("device") or "sim").type != "sim":
        return found
    written = _written(operation, args, kwargs)
    return written if written is not None else tree_map(_simulated, found)


def _written(operation: Any, args: Any, kwargs: Any) -> Any:
    """The tensor that an operation writes into and returns, None for other operations."""
    schema = operation._schema
    if not schema.is_mutable or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return None
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    names = (a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


class Module(backend_registration._DummyBackendModule):
    """`torch.sim`."""

    def device_count(self) -> int:
        return DEVICES

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *args: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *args: Any) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        return None


def _arange(operation: Any) -> Callable[..., Tensor]:
    """arange on the CPU; torch's own makes an empty tensor and resizes it."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("pin_memory", None)
        return SimulatedTensor(operation(*args, **kwargs | {"device": CPU}))

    return made


def _narrowed(operation: Any) -> Callable[..., Any]:
    """An operation under autocast."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def narrowed(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("sim")

        def narrow(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*map(narrow, args), **{name: narrow(value) for name, value in kwargs.items()})

    return narrowed


def install() -> None:
    """Make `sim` the accelerator of this process, for torch, transformers and accelerate."""
    backend_registration._setup_privateuseone_for_python_backend("sim", Module())
    everything, single = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda operation, *args, **kwargs: run(operation, args, kwargs), "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for overload in ("default", "start", "start_step"):
        name = "arange" if overload == "default" else f"arange.{overload}"
        single.impl(name, _arange(getattr(aten.arange, overload)), "PrivateUse1")
    for name in NARROWED:
        single.impl(name, _narrowed(getattr(aten, name).default), "AutocastPrivateUse1")
    kept.extend((everything, single))
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="sim")
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps its parameters, and ties
    torch.accelerator.empty_cache = lambda: None  # there is no allocator
    Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign,assignment]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "sim:0"
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
