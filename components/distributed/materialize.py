"""Initializes modules created on the meta device, with the same weights for any number of ranks, strategy and device.

Random initial weights are drawn for the full tensor on the CPU, and each rank keeps its shard. Only one tensor at a
time is held in full, never a module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from components.distributed.parallel import local
from components.registry import PluginError

aten = torch.ops.aten
RANDOM = (aten.uniform_, aten.normal_, aten.random_, aten.bernoulli_, aten.exponential_, aten.log_normal_)


class InitError(PluginError):
    """A module's ``init_weights`` leaves some parameter or buffer uninitialized."""


@torch.no_grad()
def materialize(module: nn.Module, device: torch.device, param_device: torch.device | None = None) -> None:
    """Allocate a module's memory (:func:`allocate`) and call its ``init_weights()``.

    The caller seeds torch's global CPU generator; the same seed yields the same weights everywhere.

    Raises:
        InitError: ``init_weights`` does not fill every floating-point parameter and buffer.
    """
    allocate(module, device, param_device)
    with WholeTensorRandom():
        module.init_weights()
    forgotten = [name for name, t in _floats(module) if t.isnan().any()]
    if forgotten:
        raise InitError(
            f"{type(module).__name__}.init_weights() leaves uninitialized: {', '.join(forgotten[:8])}; it must fill "
            "every parameter and buffer, even those computed in __init__ (the module is created on the meta device)"
        )


@torch.no_grad()
def allocate(module: nn.Module, device: torch.device, param_device: torch.device | None = None) -> None:
    """Allocate the memory of a module on the meta device, sharded or not, and fill it with NaN.

    Args:
        module: all parameters and buffers on the meta device.
        device: device of the buffers, and of the parameters if ``param_device`` is None.
        param_device: device of the parameters, if different (CPU offload).
    """
    module.to_empty(device=device if param_device is None else param_device)
    if param_device is not None:
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=device)
    # Uninitialized memory often looks plausible; NaN does not.
    for _, t in _floats(module):
        t.fill_(torch.nan)


def filled_by_loading(module: nn.Module) -> bool:
    """Whether strict loading of a state dict initializes all of a module, because it holds every parameter and buffer.

    False if there are non-persistent buffers, which only ``init_weights()`` can compute.
    """
    state = module.state_dict()
    return all(name in state for name, _ in (*module.named_parameters(), *module.named_buffers()))


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    held = (*module.named_parameters(), *module.named_buffers())
    return [(name, local(t)) for name, t in held if t.is_floating_point()]


class WholeTensorRandom(TorchDispatchMode):
    """Mode in which random in-place operations on DTensors or on another device draw the full tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in RANDOM:
            target = args[0]
            if isinstance(target, DTensor) or target.device.type not in ("cpu", "meta"):
                fill(target, func(torch.empty(target.shape, dtype=target.dtype), *args[1:], **(kwargs or {})))
                return target
        return func(*args, **(kwargs or {}))


class NoRandom(TorchDispatchMode):
    """Mode in which random operations yield NaN instead: for weights that are loaded afterwards."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in RANDOM:
            return args[0].fill_(torch.nan)
        if func in (aten.randn.default, aten.rand.default):
            return torch.full(args[0], torch.nan, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a full tensor, held by every rank, into ``target``; if that is sharded, into this rank's shard."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        for dim, placement in enumerate(target.placements):
            if placement.is_shard():
                chunks = whole.chunk(mesh.size(dim), placement.dim)
                mine = mesh.get_local_rank(dim)
                # If there are more ranks than rows, the last ranks have none.
                whole = chunks[mine] if mine < len(chunks) else whole.narrow(placement.dim, 0, 0)
    local(target).copy_(whole)
