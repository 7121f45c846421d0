"""A profiler's trace of a few steps, and a snapshot of the GPU's memory: ``train --profile``, or [profile] steps."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from components.parallel import World
from components.phases import PhaseClock

logger = logging.getLogger("titanrepa")

ENTRIES = 200_000  # allocations that a memory snapshot keeps, the latest; some 100 bytes each, more with their stacks
ROWS = 60  # operators in the table


class Profiler:
    """Records some steps of this start of a run, and writes what it found on every rank; then it is out of the way.

    The step before the recorded ones runs with the profiler on, since its first step is slow. A run that has fewer
    steps left records earlier, and fewer if need be.

    Args:
        steps: to record.
        first: steps of this start that run before them.
        memory: record allocations, too, for a snapshot; on a GPU only.
        folder: where the files go, made if need be.
        left: steps that this start has before it.
        world: this process.
        clock: whose phases shall be ranges of the trace.
        outside: a context for the time of writing, which is no training.
    """

    def __init__(
        self,
        *,
        steps: int,
        first: int,
        memory: bool,
        folder: Path,
        left: int,
        world: World,
        clock: PhaseClock,
        outside: Callable[[str], contextlib.AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
    ) -> None:
        self.steps = min(steps, left)
        self.first = min(first, left - self.steps)
        self.folder, self.world, self.clock, self.outside = folder, world, clock, outside
        self.memory = memory and world.device.type == "cuda"
        self._count = 0  # steps of this start that began
        self._profile: profile | None = None
        self._done = self.steps < 1

    def before(self, step: int) -> None:
        """Called before each step, counted from 0."""
        if not self._done and self._profile is None and self._count >= self.first - 1:
            self._start(step, warmup=min(self.first, 1))
        self._count += 1

    def after(self) -> None:
        """Called after each step; writes the files after the last."""
        if self._profile is None:
            return
        if self._count < self.first + self.steps:
            self._profile.step()
        else:
            self.close()

    def close(self) -> None:
        """Ends the recording, and writes what there is; also where a run ends earlier."""
        if self._profile is None:
            return
        found, self._profile, self._done = self._profile, None, True
        self.clock.ranges = False
        begin, end = self._begin + 1, self._begin + min(self._count - self.first, self.steps)
        if end < begin:  # interrupted before the first recorded step
            found.stop()
            self._end_memory(None)
            return
        with self.outside("profiling"):
            self._write(found, self.folder / f"rank{self.world.rank}_steps_{begin}-{end}", f"steps {begin} to {end}")

    def _write(self, found: profile, name: Path, what: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        snapshot = Path(f"{name}_memory_snapshot.pickle")
        trace, table = Path(f"{name}.pt.trace.json.gz"), Path(f"{name}_operators.txt")
        self._end_memory(snapshot)
        found.stop()
        found.export_chrome_trace(str(trace))
        device = "cuda" if self.world.device.type == "cuda" else "cpu"
        averages = found.key_averages()
        table.write_text(averages.table(sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=80))
        if not self.world.is_main:
            return
        lines = [
            f"profiled {what}, files written in {time.perf_counter() - start:.1f} s:",
            f"  {trace}: open it at https://ui.perfetto.dev, or in TensorBoard with the plugin torch-tb-profiler",
            f"  {table}: the operators that took longest",
        ]
        if self.memory:
            lines.append(f"  {snapshot}: drop it on https://pytorch.org/memory_viz")
        logger.info("\n".join(lines))

    def _start(self, step: int, warmup: int) -> None:
        self._begin = step + warmup
        on_gpu = self.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        plan = schedule(wait=0, warmup=warmup, active=self.steps, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, record_shapes=True, acc_events=True)
        self.clock.ranges = True
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        self._profile.start()

    def _end_memory(self, path: Path | None) -> None:
        if not self.memory:
            return
        if path is not None:
            torch.cuda.synchronize(self.world.device)
            torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
