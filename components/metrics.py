"""Scalars reported anywhere during a step, summed on the device, read and averaged over ranks when they are logged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Metrics:
    """Running means by name. :meth:`add` costs no synchronisation; :meth:`read` costs one."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds one scalar, already on the device it was computed on."""
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means since the last reading over all ranks, and a new start. Every rank must call it."""
        if not self._sums:
            return {}
        names = list(self._sums)
        # Some values (learning rates) come from the host.
        device = next((value.device for value in self._sums.values() if value.device.type != "cpu"), None)
        means = torch.stack([(self._sums[name] / self._counts[name]).to(device) for name in names])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self._sums, self._counts = {}, {}
        return dict(zip(names, means.tolist()))
