"""Exponential moving averages of modules: parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copies of some modules.

    Args:
        modules: by name; the copies start equal to them.
        decay: per step, in [0, 1).

    Attributes:
        modules: the copies, by name; frozen and in eval mode.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self._sources = dict(modules)
        self.modules = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Makes the copies equal to their sources."""
        for name, module in self.modules.items():
            module.load_state_dict(self._sources[name].state_dict())

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Moves every copy by (1 - decay) towards its source where ``finite`` (a bool scalar), else not at all.

        Integer buffers are copied.
        """
        amount: dict[torch.dtype, Tensor] = {}
        for name, module in self.modules.items():
            source = self._sources[name]
            pairs = [*zip(module.parameters(), source.parameters()), *zip(module.buffers(), source.buffers())]
            for average, value in pairs:
                if not average.is_floating_point():
                    average.copy_(value)
                    continue
                if average.dtype not in amount:
                    amount[average.dtype] = torch.where(finite, 1.0 - self.decay, 0.0).to(average.dtype)
                average.lerp_(value, amount[average.dtype])
