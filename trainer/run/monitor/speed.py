"""Training speed and memory; the time of drawing, evaluation, saving and logging is measured separately."""

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
    """Divides wall time into training and interruptions.

    An interruption must begin when the device is idle, and ends with a synchronization, so that host time equals
    device time.

    Args:
        device: to synchronize with at the end of an interruption.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Reset all times."""
        self._since = time.perf_counter()
        self._outside: dict[str, float] = {}

    @contextlib.contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Context manager whose time counts as interruption ``name`` instead of training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._outside[name] = self._outside.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Return seconds of training and of each interruption since the last call, and reset them."""
        now = time.perf_counter()
        outside, since = self._outside, self._since
        self._outside, self._since = {}, now
        return max(now - since - sum(outside.values()), 1e-9), outside


def speeds(
    images: int, seconds: float, ranks: int, flops_per_image: int | None, peak: float | None
) -> dict[str, float]:
    """Speed scalars of an interval of training.

    Args:
        images: over all ranks.
        seconds: of training.
        ranks: number of ranks.
        flops_per_image: FLOPs of the model per image; None: unknown.
        peak: TFLOP/s of one GPU; None: unknown, or no GPU.
    """
    found = {"speed/images_per_s": images / seconds, "speed/images_per_s_per_gpu": images / seconds / ranks}
    if flops_per_image is not None:
        found["speed/tflops_per_gpu"] = found["speed/images_per_s_per_gpu"] * flops_per_image / 1e12
        if peak is not None:
            found["speed/mfu"] = found["speed/tflops_per_gpu"] / peak
    return found


def memory(device: torch.device) -> dict[str, float]:
    """Memory scalars in GiB: memory held by PyTorch on a GPU, or resident memory of the process on a CPU."""
    if device.type == "cuda":
        return {
            "memory/allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "memory/reserved_gib": torch.cuda.memory_reserved(device) / GIB,
            "memory/peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        }
    return {"memory/resident_gib": resident_bytes() / GIB}


def resident_bytes() -> int:
    """Resident memory of this process in bytes; without /proc, its peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def clock_time(seconds: float) -> str:
    """Format seconds as "1:02:03" or "2 days, 1:02:03"."""
    return str(timedelta(seconds=round(seconds)))


class Eta:
    """Estimates the remaining time of a run from the time since its start, including interruptions.

    Args:
        step: last finished step at the start.
        total: steps of the run.
    """

    def __init__(self, step: int, total: int) -> None:
        self.total = total
        self._start, self._first = time.perf_counter(), step

    def __call__(self, step: int) -> str:
        """Remaining time after ``step`` steps, as text; empty until two steps have finished since the start."""
        done = step - self._first
        if done < 2:
            return ""
        return clock_time((time.perf_counter() - self._start) / done * (self.total - step))


def device_peak(device: torch.device) -> tuple[str, float | None]:
    """Name of a GPU, and its dense bf16 peak in TFLOP/s or None if unknown."""
    name = torch.cuda.get_device_name(device)
    return name, peak_tflops(name)
