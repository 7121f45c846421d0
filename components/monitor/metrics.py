"""Step metrics: collected on the device, read by the host one step later, averaged between log entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.monitor.phases import PhaseTimes

TIME = "time/"  # durations on this rank; differ between ranks and between runs


@dataclass
class StepRecord:
    """Scalars of one step, copied from the device to the host; identical on all ranks except ``time/*``.

    The constructor starts the copy and :meth:`read` waits for it. Read one step later, it does not stall the device.

    Attributes:
        step: counted from 0.
        names: names of the scalars.
        values: (n,) float64 on the device.
        host: further scalars that are already on the host.
        layers: by parameter group: names of its parameters, and the norms of their gradients (k,) on the device.
        times: phase times of this rank.
        local: first scalars of ``values`` (k,), k <= n, as they are on this rank alone; None: unknown.
    """

    step: int
    names: Sequence[str]
    values: Tensor
    host: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, tuple[Sequence[str], Tensor]] = field(default_factory=dict)
    times: PhaseTimes | None = None
    local: Tensor | None = None

    def __post_init__(self) -> None:
        self._copied = None
        self._host_values = self.values
        if self.values.is_cuda:
            self._host_values = torch.empty_like(self.values, device="cpu", pin_memory=True)
            self._host_values.copy_(self.values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> dict[str, float]:
        """The scalars by name, with ``time/<phase>`` and ``time/step`` in milliseconds if the step was timed."""
        if self._copied is not None:
            self._copied.synchronize()
        times = {} if self.times is None else self.times.read()
        measured = dict(zip(self.names, self._host_values.tolist())) | dict(self.host)
        return measured | {f"{TIME}{name}": value for name, value in times.items()}


def same_on_all_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Values without ``time/*``, which differ between ranks and so must not influence control flow."""
    return {name: value for name, value in values.items() if not name.startswith(TIME)}


def broken_here(record: StepRecord) -> list[str]:
    """Names of a step's terms that are not finite on this rank. Waits for the device."""
    if record.local is None:
        return []
    return [name for name, value in zip(record.names, record.local.tolist()) if not math.isfinite(value)]


class Metrics:
    """Means of host values by name since the last :meth:`read`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Add a step's values, except non-finite ones, which would make the interval's mean useless."""
        for name, value in values.items():
            if not math.isfinite(value):
                continue
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Return the means since the last call and reset them."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
