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
        for average, value in self._pairs():
            average.copy_(value)

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
        """Pairs of average and source tensor; this rank's shards for sharded ones."""
        for name, module in self.modules.items():
            source = self._sources[name]
            pairs = [*zip(module.parameters(), source.parameters()), *zip(module.buffers(), source.buffers())]
            for average, value in pairs:
                yield local(average), local(value)
