"""A profiler's trace of a few steps, and a snapshot of the GPU's memory: ``train --profile``, or [profile] steps."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from components.distributed.parallel import World
from components.monitor.phases import PhaseClock

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
        if self._profile is not None:
            # Here, not after a step: what follows the step that warms up, as pictures, is not of interest.
            self._profile.step()
        elif not self._done and self._count >= self.first - 1:
            self._start(step, warmup=min(self.first, 1))
        self._count += 1

    def after(self) -> None:
        """Called after each step; writes the files after the last."""
        if self._count >= self.first + self.steps:
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
            name = self.folder / f"rank{self.world.rank}_steps_{begin}-{end}"
            try:
                self._write(found, name, f"steps {begin} to {end}")
            except OSError as error:
                logger.warning(f"the profile could not be written: {error}. The run goes on")

    def _write(self, found: profile, name: Path, what: str) -> None:
        start = time.perf_counter()
        snapshot = Path(f"{name}_memory_snapshot.pickle")
        trace, table = Path(f"{name}.pt.trace.json.gz"), Path(f"{name}_operators.txt")
        found.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_memory(snapshot)
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
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports the lack of a GPU as an error
        self._begin = step + warmup
        on_gpu = self.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a run of one step has none to warm up with
            plan = schedule(wait=0, warmup=warmup, active=self.steps, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, record_shapes=True, acc_events=True)
        self.clock.ranges = True
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        self._profile.start()

    def _end_memory(self, path: Path | None) -> None:
        if not self.memory:
            return
        try:
            if path is not None:
                torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
