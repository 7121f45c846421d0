"""From the meta device to weights: the same numbers for every number of ranks, strategy and device.

A random number of the initial weights is drawn for the whole tensor, on the CPU; each rank keeps its part. So one
tensor at a time is whole, never a module.
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
    """A module's ``init_weights`` does not initialise all of it."""


@torch.no_grad()
def materialise(module: nn.Module, device: torch.device, param_device: torch.device | None = None) -> None:
    """:func:`allocate`, then ``init_weights()``.

    The caller seeds torch's global CPU generator; the same seed gives the same weights everywhere.

    Raises:
        InitError: ``init_weights`` leaves a floating-point parameter or buffer alone.
    """
    allocate(module, device, param_device)
    with WholeTensorRandom():
        module.init_weights()
    forgotten = [name for name, t in _floats(module) if t.isnan().any()]
    if forgotten:
        raise InitError(
            f"{type(module).__name__}.init_weights() leaves uninitialised: {', '.join(forgotten[:8])}; it must fill "
            "every parameter and every buffer, those made in __init__ too (the module is made on the meta device)"
        )


@torch.no_grad()
def allocate(module: nn.Module, device: torch.device, param_device: torch.device | None = None) -> None:
    """Gives memory, full of NaN, to a module on the meta device, sharded or not.

    Args:
        module: every parameter and buffer on the meta device.
        device: where buffers go, and parameters unless
        param_device: says otherwise (parts that are offloaded to the host).
    """
    module.to_empty(device=device if param_device is None else param_device)
    if param_device is not None:
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=device)
    # Uninitialised memory often looks plausible; NaN does not.
    for _, t in _floats(module):
        t.fill_(torch.nan)


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    held = (*module.named_parameters(), *module.named_buffers())
    return [(name, local(t)) for name, t in held if t.is_floating_point()]


class WholeTensorRandom(TorchDispatchMode):
    """Inside, random in-place operations on sharded tensors or another device draw the whole tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in RANDOM:
            target = args[0]
            if isinstance(target, DTensor) or target.device.type not in ("cpu", "meta"):
                fill(target, func(torch.empty(target.shape, dtype=target.dtype), *args[1:], **(kwargs or {})))
                return target
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, which every rank has, into a tensor or this rank's part of it."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        for dim, placement in enumerate(target.placements):
            if placement.is_shard():
                chunks = whole.chunk(mesh.size(dim), placement.dim)
                mine = mesh.get_local_rank(dim)
                # More ranks than rows: the last ranks have none.
                whole = chunks[mine] if mine < len(chunks) else whole.narrow(placement.dim, 0, 0)
    local(target).copy_(whole)
