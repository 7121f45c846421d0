"""What a step measured: gathered on the device, read by the host one step later, averaged until it is logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.monitor.phases import PhaseTimes

TIME = "time/"  # how long this rank took; no two ranks, and no two runs, measure the same


@dataclass
class StepRecord:
    """One step's scalars on their way from the device to the host; the same on every rank, but for ``time/*``.

    Making one starts the copy; :meth:`read` waits for it. Read a step later, it costs the device no wait.

    Attributes:
        step: counted from 0.
        names: of the scalars.
        values: (n,) float64 on the device.
        host: more scalars, which the host knows.
        layers: by parameter group: names of its parameters, and the norms of their gradients (k,) on the device.
        times: of this rank, by phase.
    """

    step: int
    names: Sequence[str]
    values: Tensor
    host: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, tuple[Sequence[str], Tensor]] = field(default_factory=dict)
    times: PhaseTimes | None = None

    def __post_init__(self) -> None:
        self._copied = None
        self._host_values = self.values
        if self.values.is_cuda:
            self._host_values = torch.empty_like(self.values, device="cpu", pin_memory=True)
            self._host_values.copy_(self.values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> dict[str, float]:
        """The scalars by name; ``time/<phase>`` and ``time/step`` in milliseconds, where a clock ran."""
        if self._copied is not None:
            self._copied.synchronize()
        times = {} if self.times is None else self.times.read()
        measured = dict(zip(self.names, self._host_values.tolist())) | dict(self.host)
        return measured | {f"{TIME}{name}": value for name, value in times.items()}


def same_on_all_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """What may decide how a run goes on: all that a record holds but for the times, which each rank has its own of."""
    return {name: value for name, value in values.items() if not name.startswith(TIME)}


class Metrics:
    """Means of host values by name, from one reading to the next."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Adds a step's values but for those that are not finite, which would hide all others of the interval."""
        for name, value in values.items():
            if not math.isfinite(value):
                continue
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means since the last reading, and a new start."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
