"""Exponential moving average (EMA) of modules' parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from components.distributed.parallel import local


def frozen_copy(module: nn.Module) -> nn.Module:
    """Deep copy for EMA weights: frozen, in eval mode. Call it before sharding; sharded modules cannot be copied."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def copy_values(target: nn.Module, source: nn.Module) -> None:
    """Copy parameters and buffers of ``source`` to its copy ``target``, which is sharded like it."""
    for copied, value in _pairs(target, source):
        copied.copy_(value)


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, decay: float, finite: Tensor) -> None:
    """Update the average of a module, average += (1 - decay) * (value - average), if ``finite`` is true.

    Integer buffers are always copied.

    Args:
        average: copy of ``source`` (:func:`frozen_copy`), sharded like it.
        source: the trained module.
        decay: per step, in [0, 1).
        finite: bool scalar on the device, which is not read on the host.
    """
    amount: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for mine, value in _pairs(average, source):
        if not mine.is_floating_point():
            mine.copy_(value)
            continue
        kind = mine.dtype, mine.device
        if kind not in amount:
            amount[kind] = finite.to(mine.device, mine.dtype) * (1.0 - decay)
        mine.lerp_(value, amount[kind])


def _pairs(target: nn.Module, source: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of corresponding tensors; this rank's shards for sharded ones."""
    pairs = [*zip(target.parameters(), source.parameters()), *zip(target.buffers(), source.buffers())]
    for mine, theirs in pairs:
        yield local(mine), local(theirs)


class Ema:
    """Exponential moving average of modules.

    Args:
        modules: modules to average, by name.
        decay: per step, in [0, 1).
        copies: modules for the averages (:func:`frozen_copy`), by name, sharded like ``modules`` and overwritten with
            their values; None: created here.

    Attributes:
        modules: the averages, by name; frozen and in eval mode.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], decay: float, copies: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.decay = decay
        self._sources = dict(modules)
        self.modules = dict(copies) if copies else {name: frozen_copy(module) for name, module in modules.items()}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Reset the averages to the current values."""
        for name, module in self.modules.items():
            copy_values(module, self._sources[name])

    def update(self, finite: Tensor) -> None:
        """Update the averages if ``finite`` (a bool scalar) is true; see :func:`update_average`."""
        for name, module in self.modules.items():
            update_average(module, self._sources[name], self.decay, finite)
