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

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Update the averages, average += (1 - decay) * (value - average), if ``finite`` (a bool scalar) is true.

        Integer buffers are always copied.
        """
        amount: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for average, value in self._pairs():
            if not average.is_floating_point():
                average.copy_(value)
                continue
            kind = average.dtype, average.device
            if kind not in amount:
                amount[kind] = finite.to(average.device, average.dtype) * (1.0 - self.decay)
            average.lerp_(value, amount[kind])

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, module in self.modules.items():
            yield from _pairs(module, self._sources[name])
