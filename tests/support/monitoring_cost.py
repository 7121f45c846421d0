"""Measures the cost of monitoring: python -m tests.support.monitoring_cost CONFIG [--section.key=value ...]

Not a test. Trains for a few steps on one thread and prints the processor time of each measurement. On a CPU that is
the whole cost; on a GPU, only the host's part.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from statistics import median
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from components.distributed import parallel
from components.monitor import phases
from components.nn.latent_norm import LatentNorm
from trainer import config
from trainer.commands.train import set_backends
from trainer.run import loop, pictures, report, step
from trainer.run.monitor.events import EventWriter

STEPS = 20


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def main(path: str, overrides: list[str]) -> None:
    folder = tempfile.mkdtemp()
    every = [f"--training.steps={STEPS}", f"--run.dir={folder}", f"--run.log_every={STEPS // 4}",
             f"--sampling.every={STEPS}", "--run.checkpoint_every=0", "--training.threads=1"]  # fmt: skip
    loaded = config.load(path, [*overrides, *every])
    set_backends(loaded)
    world = parallel.join_world()
    spent: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()

    def watch(owner, name: str, what: str, count: bool = False):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            if count and what not in counts:
                with Operators() as operators:  # too slow to be timed
                    result = function(*args, **kwargs)
                counts[what] = operators.count
                return result
            begin = time.thread_time()
            result = function(*args, **kwargs)
            times.append(time.thread_time() - begin)
            return result

        times = spent[what] = []
        return mock.patch.object(owner, name, timed)

    patches = [
        watch(phases.PhaseClock, "_mark", "phase clock"),
        watch(step, "statistics", "latent statistics", count=True),
        watch(LatentNorm, "summary", "latent norm's statistics", count=True),
        watch(report.Reporter, "_report", "log line and TensorBoard points"),
        watch(pictures, "in_colors", "picture of the latents"),
        watch(EventWriter, "histogram", "histogram"),
        watch(loop, "try_flops_per_image", "counting the operations"),
        watch(step.Step, "__call__", "whole step"),
    ]
    for patch in patches:
        patch.start()
    trainer = loop.Trainer(loaded, world)
    trainer.checkpoints.save = lambda _: None
    trainer.run()
    print(f"{world.device.type}, torch {torch.__version__}, {path}")
    print(f"{'':<36}{'ms, median':>12}{'times':>8}{'operators':>11}")
    for what, seconds in spent.items():
        print(f"{what:<36}{median(seconds) * 1e3:>12.4f}{len(seconds):>8}{counts.get(what, ''):>11}")
    marks = len(spent["phase clock"]) / STEPS
    print(f"the phase clock marks {marks:g} times a step: {marks * median(spent['phase clock']) * 1e3:.3f} ms")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
