"""Measured peak memory of a training step on this machine, to compare with an estimate."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from components.distributed import parallel
from components.distributed.parallel import World
from trainer.commands.train import set_backends
from trainer.config import Config, ConfigError
from trainer.estimate.dry_run import micro_batches
from trainer.run.allocator import return_freed_memory
from trainer.run.assemble import build, check
from trainer.run.monitor.flops import never_stop
from trainer.run.step import make_step

STEPS = 2  # optimizer states exist from the second step on


def measure_peak(config: Config, world: World) -> tuple[float, bool]:
    """Run real steps with random weights and images, and measure their peak memory.

    On a GPU: memory allocated by PyTorch. On a CPU: growth of the process's resident memory since before the model was
    built, which includes scratch memory of libraries.

    Returns:
        Peak in bytes, the maximum over ranks; whether the steps ran in bf16.

    Raises:
        ConfigError: there is neither a GPU nor Linux.
    """
    set_backends(config)
    on_gpu = world.device.type == "cuda"
    if not on_gpu and not sys.platform.startswith("linux"):
        raise ConfigError("--measure needs a GPU, or Linux to read the process's memory")
    # Import the plugins' dependencies first, so that they are not counted.
    check(config, world.size, world.local_size)
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _return_freed_memory()
        before = _resident("VmRSS")
    parts = build(config, world, files=False)
    step = make_step(config, parts, world.device)
    never_stop(parts)
    for _ in range(STEPS):
        step(config.training.steps - 1, micro_batches(config, parts, world, config.training.accumulation))
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM") - before
    return max(row[0] for row in parallel.gather_floats(float(peak))), step.autocast_dtype is not None


def _return_freed_memory() -> None:
    """Let the peak count live tensors only."""
    return_freed_memory()
    # Reset VmHWM, which so far holds the peak of the imports.
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """Resident memory of this process in bytes: ``field`` is VmRSS (current) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
