"""How fast a run trains: the time of training alone, apart from pictures, evaluation, saving and logging."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from components.monitor.hardware import peak_tflops

GIB = 2**30


class Stopwatch:
    """Divides the host's time into training and what interrupts it.

    What interrupts must begin when the device has nothing left to do, and on a GPU it is over when the device is done
    with it; then the host's clock tells the device's time.

    Args:
        device: whose work is waited for at the end of an interruption.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Starts over."""
        self._since = time.perf_counter()
        self._outside: dict[str, float] = {}

    @contextlib.contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """The time inside is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._outside[name] = self._outside.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds of training since the last reading, and seconds of each interruption; a new start."""
        now = time.perf_counter()
        outside, since = self._outside, self._since
        self._outside, self._since = {}, now
        return max(now - since - sum(outside.values()), 1e-9), outside


def speeds(
    images: int, seconds: float, ranks: int, flops_per_image: int | None, peak: float | None
) -> dict[str, float]:
    """Scalars of an interval of training.

    Args:
        images: over all ranks.
        seconds: of training.
        ranks: that share them.
        flops_per_image: that the model needs; None: not known.
        peak: TFLOP/s of a GPU; None: not known, or no GPU.
    """
    found = {"speed/images_per_s": images / seconds, "speed/images_per_s_per_gpu": images / seconds / ranks}
    if flops_per_image is not None:
        found["speed/tflops_per_gpu"] = found["speed/images_per_s_per_gpu"] * flops_per_image / 1e12
        if peak is not None:
            found["speed/mfu"] = found["speed/tflops_per_gpu"] / peak
    return found


def memory(device: torch.device) -> dict[str, float]:
    """Scalars: of a GPU what PyTorch holds there, else the process's resident memory."""
    if device.type == "cuda":
        return {
            "memory/allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "memory/reserved_gib": torch.cuda.memory_reserved(device) / GIB,
            "memory/peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        }
    return {"memory/resident_gib": resident_bytes() / GIB}


def resident_bytes() -> int:
    """Of this process, now; where the system does not tell, at most so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def clock_time(seconds: float) -> str:
    """As "1:02:03" or "2 days, 1:02:03"."""
    return str(timedelta(seconds=round(seconds)))


class Eta:
    """Estimates when a run is done from the whole time since it started, interruptions included.

    Args:
        step: finished when it started.
        total: of the run.
    """

    def __init__(self, step: int, total: int) -> None:
        self.total = total
        self._start, self._first = time.perf_counter(), step

    def __call__(self, step: int) -> str:
        """What is left after ``step`` steps; empty before the second."""
        done = step - self._first
        if done < 2:
            return ""
        return clock_time((time.perf_counter() - self._start) / done * (self.total - step))


def device_peak(device: torch.device) -> tuple[str, float | None]:
    """A GPU's name, and its dense bf16 peak in TFLOP/s; None: not known."""
    name = torch.cuda.get_device_name(device)
    return name, peak_tflops(name)
