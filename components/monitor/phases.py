"""Measures how a step's time divides into named phases, without synchronizing with the device.

``with phase("encoders"):`` can be used anywhere, like ``torch.profiler.record_function``, and is a no-op while no clock
is running. Do not use it in code that torch.compile traces.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

REST = "optimizer"  # time outside of all phases: gradient norms, clipping, optimizers, EMA

_current: PhaseClock | None = None
_NOTHING = contextlib.nullcontext()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Context manager that attributes its time to phase ``name``, not to the enclosing phase."""
    return _NOTHING if _current is None else _current.phase(name)


def segments() -> contextlib.AbstractContextManager[None]:
    """Context manager that divides its time into segments, each named when it ends by :func:`end_segment`."""
    return _NOTHING if _current is None else _current.segments()


def end_segment(name: str) -> None:
    """End the current segment: attribute its time to ``name``, except the time of phases inside it."""
    if _current is not None:
        _current.end_segment(name)


def waiting(name: str, items: Iterable[Any]) -> Iterator[Any]:
    """Yield the same items; attribute the time spent waiting for each to phase ``name``."""
    iterator, end = iter(items), object()
    while True:
        with phase(name):
            item = next(iterator, end)
        if item is end:
            return
        yield item


@contextlib.contextmanager
def timed(clock: PhaseClock | None) -> Iterator[PhaseTimes | None]:
    """Run ``clock`` as the current clock of the process; yields its times, to be read after exit. None: no clock."""
    global _current
    if clock is None:
        yield None
        return
    before, _current = _current, clock
    times = clock.start()
    try:
        yield times
    finally:
        _current = before
        clock.stop()


class PhaseTimes:
    """Phase times of one step, read from the device only when :meth:`read` is called."""

    def __init__(self, pool: list[torch.cuda.Event]) -> None:
        self.names: list[str | None] = []  # name of the phase that begins at each stamp
        self.stamps: list[Any] = []  # CUDA events on a GPU, seconds on a CPU
        self._pool = pool
        self._found: dict[str, float] | None = None

    def read(self) -> dict[str, float]:
        """Return milliseconds by phase, and of the whole step as "step". Waits for the device to finish the step."""
        if self._found is None:
            self._found = {}
            last = self.stamps[-1]
            if isinstance(last, torch.cuda.Event) and not last.query():
                last.synchronize()
            for name, begin, end in zip(self.names, self.stamps, self.stamps[1:]):
                name = REST if name is None else name
                self._found[name] = self._found.get(name, 0.0) + _milliseconds(begin, end)
            self._found[REST] = self._found.pop(REST)  # last in the report, too
            self._found["step"] = _milliseconds(self.stamps[0], self.stamps[-1])
            self._pool += [stamp for stamp in self.stamps if isinstance(stamp, torch.cuda.Event)]
            self.stamps = []
        return dict(self._found)


class PhaseClock:
    """Clock that measures the phases of consecutive steps.

    On a GPU, each change of phase records an event on the current stream (about 1 microsecond on the host, no
    synchronization). A phase lasts until the device reaches the first kernel of the next phase: it includes kernels and
    the gaps between them. On a CPU, the clock reads the host's time.

    Args:
        device: device that the step runs on.

    Attributes:
        ranges: whether to open a ``record_function`` range for each phase, for profiler traces.
    """

    def __init__(self, device: torch.device) -> None:
        self.ranges = False
        self._cuda = device.type == "cuda"
        self._pool: list[torch.cuda.Event] = []
        self._times = PhaseTimes(self._pool)
        self._name: str | None = None  # current phase; None: a segment, not named yet
        self._unnamed: list[int] = []  # indices of stamps in the current segment
        self._segments: list[str] = []  # segments of this step, in order
        self._expected: list[str] = []  # segments of the previous step, as a range is named when it begins
        self._range: Any = None

    def start(self) -> PhaseTimes:
        """Begin a step; its time belongs to ``REST`` until a phase begins."""
        self._times = PhaseTimes(self._pool)
        self._segments, self._unnamed = [], []
        self._mark(REST)
        return self._times

    def stop(self) -> None:
        """End the step."""
        self._close_range()
        self._times.stamps.append(self._stamp())
        self._expected = self._segments

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See :func:`phase`."""
        outer = self._name
        self._mark(name)
        try:
            yield
        finally:
            self._mark(outer)

    @contextlib.contextmanager
    def segments(self) -> Iterator[None]:
        """See :func:`segments`."""
        with self.phase(REST):
            self._mark(None)
            try:
                yield
            finally:
                self._unnamed.clear()

    def end_segment(self, name: str) -> None:
        """See :func:`end_segment`."""
        for index in self._unnamed:
            self._times.names[index] = name
        self._unnamed.clear()
        self._segments.append(name)
        if self._name is None:
            self._mark(None)

    def _mark(self, name: str | None) -> None:
        """Begin a phase; None: a segment that is named later."""
        if name is None:
            self._unnamed.append(len(self._times.names))
        self._name = name
        self._times.names.append(name)
        self._times.stamps.append(self._stamp())
        if self.ranges:
            self._close_range()
            if name is None:
                place = len(self._segments)
                rest = REST if self._expected else "recipe"
                name = self._expected[place] if place < len(self._expected) else rest
            self._range = torch.profiler.record_function(name)
            self._range.__enter__()

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _stamp(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _milliseconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) if isinstance(end, torch.cuda.Event) else (end - begin) * 1e3
