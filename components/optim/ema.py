"""Exponential moving averages of modules: parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from components.distributed.parallel import local


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy to average into: frozen, in eval mode. Comes before sharding, which forbids copies."""
    return copy.deepcopy(module).eval().requires_grad_(False)


class Ema:
    """Averaged copies of some modules.

    Args:
        modules: by name; with ``copies``, sharded alike.
        decay: per step, in [0, 1).
        copies: what to average into (:func:`frozen_copy`), by name; none: made here. They start equal to ``modules``.

    Attributes:
        modules: the copies, by name; frozen and in eval mode.
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
        """Makes the copies equal to their sources."""
        for average, value in self._pairs():
            average.copy_(value)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Moves every copy by (1 - decay) towards its source where ``finite`` (a bool scalar), else not at all.

        Integer buffers are copied.
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
        """Each tensor of the copies with its source; of sharded ones this rank's parts."""
        for name, module in self.modules.items():
            source = self._sources[name]
            pairs = [*zip(module.parameters(), source.parameters()), *zip(module.buffers(), source.buffers())]
            for average, value in pairs:
                yield local(average), local(value)
