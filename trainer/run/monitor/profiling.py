"""PyTorch profiler trace and GPU memory snapshot of a few steps, for ``train --profile`` or ``profile.steps``."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from components.distributed.parallel import World
from components.monitor.phases import PhaseClock
from trainer.config import Config

logger = logging.getLogger("titanrepa")

ENTRIES = 200_000  # latest allocations kept in a memory snapshot; about 100 bytes each, more with their stacks
ROWS = 60  # operators in the table


class Profiler:
    """Records some steps after a start of a run, once, and writes the results on every rank.

    The profiler is on one step earlier than the recorded ones, since its first step is slow. If fewer steps are left,
    recording begins earlier and, if necessary, covers fewer steps.

    Args:
        steps: number of steps to record.
        first: number of steps to run before them.
        memory: also record allocations for a snapshot; on GPUs only.
        folder: output folder, created if missing.
        left: number of steps left in the run.
        world: this process.
        clock: its phases become named ranges in the trace.
        outside: context manager for the time spent on writing, which is not training time.
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
        self._count = 0  # steps begun since the start
        self._profile: profile | None = None
        self._done = self.steps < 1

    def before(self, step: int) -> None:
        """To be called before each step; ``step`` counts from 0."""
        if self._profile is not None:
            # Here rather than after a step, to exclude what follows the warmup step, such as drawing.
            self._profile.step()
        elif not self._done and self._count >= self.first - 1:
            self._start(step, warmup=min(self.first, 1))
        self._count += 1

    def after(self) -> None:
        """To be called after each step; writes the files after the last recorded one."""
        if self._count >= self.first + self.steps:
            self.close()

    def close(self) -> None:
        """End the recording and write the files, also if the run ends before the last step to record."""
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
                logger.warning(f"the profile could not be written: {error}. Training continues")

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
            f"profiled {what}, wrote files in {time.perf_counter() - start:.1f} s:",
            f"  {trace}: open it at https://ui.perfetto.dev, or in TensorBoard with the plugin torch-tb-profiler",
            f"  {table}: the most expensive operators",
        ]
        if self.memory:
            lines.append(f"  {snapshot}: open it at https://pytorch.org/memory_viz")
        logger.info("\n".join(lines))

    def _start(self, step: int, warmup: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # silence the error it reports without a GPU
        self._begin = step + warmup
        on_gpu = self.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing warmup step, if the run has one step
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


@contextlib.contextmanager
def profiling(
    config: Config,
    step: int,
    world: World,
    clock: PhaseClock,
    outside: Callable[[str], contextlib.AbstractContextManager[None]],
) -> Iterator[Profiler | None]:
    """Context manager around the steps after ``step``; yields the profiler if the config asks for one."""
    table = config.profile
    if not table.steps:
        yield None
        return
    profiler = Profiler(
        **table.model_dump(), folder=Path(config.run.dir) / "profile", left=config.training.steps - step, world=world,
        clock=clock, outside=outside,
    )  # fmt: skip
    with contextlib.closing(profiler):
        yield profiler
