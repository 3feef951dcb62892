"""A model whose weights are divided over processes: FSDP2, each decoder layer a unit, the rest the root.

    shard(model, layout)      divide the weights of a model, in place
    with whole(model):        its parameters are plain and whole, and no forward pass communicates
    gathered(model)           one whole tensor after another, on every process

Every function here is a collective: each process of the layout has to call it. `reshard_after_forward` is set on every
unit, the root included: FSDP2 leaves the root's weights whole after a forward pass without gradient, and what is
written to them then (an anchor's update) is lost at the next reshard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gemma2.core.ranks import Ranks
from gemma2.posttrain.models.lora import plain_class
from gemma2.posttrain.models.protocols import Network

__all__ = [
    "ShardLayout",
    "gathered",
    "is_sharded",
    "layers_of",
    "layout_of",
    "local",
    "plain_class",
    "shard",
    "whole",
    "whole_head",
]


@dataclass(frozen=True)
class ShardLayout:
    """The processes that weights are divided over. mesh: (replicas, shards), or (shards,) on one node."""

    mesh: DeviceMesh
    device: torch.device

    @property
    def shards(self) -> int:
        """The number of parts of each weight."""
        return int(self.mesh.size(-1))


def layout_of(ranks: Ranks, device: torch.device, nodes: int = 1) -> ShardLayout:
    """Divide over the processes of a node, and hold one copy per node: a gather never crosses the slow link.

    nodes: 1 divides over all processes, also of several nodes, for models that do not fit one.
    One process without a launcher gets a process group that consists of it alone.
    """
    if not dist.is_initialized():
        if ranks.size > 1:
            raise RuntimeError("several processes without a process group: ranks.join comes first")
        dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    if nodes > 1:
        mesh = init_device_mesh(device.type, (nodes, ranks.size // nodes), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return ShardLayout(mesh, device)


def layers_of(model: Network) -> list[nn.Module]:
    """The decoder layers of a causal LM or reward model, inside or outside peft's wrapper."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers"
    ]
    if len(found) != 1:
        raise RuntimeError(f"{type(model).__name__} has {len(found)} lists of layers, one is needed to shard it")
    return list(found[0])


def shard(model: Network, layout: ShardLayout, compute: torch.dtype | None = None) -> None:
    """Divide the weights of a model, in place. compute: dtype of the products; None: that of the weights.

    Gradients are reduced in fp32 where the products are in another dtype. Parameters may be on the meta device:
    `into_shards.py` fills their shards.
    """
    # Inputs are not cast: the lowest fp32 number of an additive mask would become -inf, and a padded row NaN.
    precision = MixedPrecisionPolicy(compute, compute and torch.float32, cast_forward_inputs=False)
    for layer in layers_of(model):
        fully_shard(layer, mesh=layout.mesh, mp_policy=precision, reshard_after_forward=True)
    assert isinstance(model, nn.Module)
    fully_shard(model, mesh=layout.mesh, mp_policy=precision, reshard_after_forward=True)


def is_sharded(model: object) -> bool:
    """Whether the weights of a model are divided over processes."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; a tensor that is not divided as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _units(model: object) -> list[FSDPModule]:
    assert isinstance(model, nn.Module)
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(*models: object) -> Iterator[None]:
    """Gather the weights of all sharded models here; others are left alone. Nothing in the block may change weights.

    Inside, `parameters()` are plain tensors in the dtype of the products, and a process may run as many forward passes
    as it likes.
    """
    units = [unit for model in models if is_sharded(model) for unit in _units(model)]
    for model in models:
        if isinstance(model, FSDPModule):
            model._get_fsdp_state()._lazy_init()  # else the first unit that runs takes itself for the root
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


@contextmanager
def whole_head(*models: object) -> Iterator[None]:
    """Gather what sharded models have outside their layers: embedding, head, last norm; others are left alone.

    Layers gather their weights as they run, so each process has to run as many forward passes as the others.
    """
    roots = [model for model in models if isinstance(model, FSDPModule)]
    try:
        for root in roots:
            root._get_fsdp_state()._lazy_init()
            root.set_reshard_after_forward(False, recurse=False)
            root.unshard()
        yield
    finally:
        for root in roots:
            root.set_reshard_after_forward(True, recurse=False)
            root.reshard()


@torch.no_grad()
def gathered(model: Network, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor on the CPU) of every parameter, tied ones once. Every process has to go through all.

    names: of the parameters that are wanted; default: all.
    Only rank 0 keeps the values: the others get an empty tensor. Parameters that are not divided come as they are.
    """
    main = dist.get_rank() == 0
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        value = parameter.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        yield name, value.cpu() if main else torch.empty(0, dtype=value.dtype)
