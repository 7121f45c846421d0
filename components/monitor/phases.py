"""Where the time of a step goes: a clock that divides it into named phases, without waiting for the device.

``with phase("encoders"):`` works anywhere, like ``torch.profiler.record_function``, and does nothing where no clock
runs. Never call it in code that torch.compile traces.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

REST = "optimizer"  # what no phase claims: norms, clipping, optimizers, EMA

_current: PhaseClock | None = None
_NOTHING = contextlib.nullcontext()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Charges the time inside to ``name``, and not to the phase around it."""
    return _NOTHING if _current is None else _current.phase(name)


def segments() -> contextlib.AbstractContextManager[None]:
    """Charges the time inside, piece by piece, to the names that :func:`end_segment` gives afterwards."""
    return _NOTHING if _current is None else _current.segments()


def end_segment(name: str) -> None:
    """Charges the time since the last segment ended to ``name``, but for what other phases have claimed."""
    if _current is not None:
        _current.end_segment(name)


def waiting(name: str, items: Iterable[Any]) -> Iterator[Any]:
    """The same items; charges the time until each is there to ``name``."""
    iterator, end = iter(items), object()
    while True:
        with phase(name):
            item = next(iterator, end)
        if item is end:
            return
        yield item


@contextlib.contextmanager
def timed(clock: PhaseClock | None) -> Iterator[PhaseTimes | None]:
    """Runs ``clock`` inside, as the process's current one; gives what it will have measured. None: no clock."""
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
    """The phases of one step, on their way from the device to the host."""

    def __init__(self, pool: list[torch.cuda.Event]) -> None:
        self.names: list[str | None] = []  # of the phase that begins at each stamp
        self.stamps: list[Any] = []  # seconds on a CPU, else events
        self._pool = pool
        self._found: dict[str, float] | None = None

    def read(self) -> dict[str, float]:
        """Milliseconds by phase, and of the whole as "step". Waits until the device has passed the last phase."""
        if self._found is None:
            self._found = {}
            last = self.stamps[-1]
            if isinstance(last, torch.cuda.Event) and not last.query():
                last.synchronize()
            for name, begin, end in zip(self.names, self.stamps, self.stamps[1:]):
                name = REST if name is None else name
                self._found[name] = self._found.get(name, 0.0) + _milliseconds(begin, end)
            self._found[REST] = self._found.pop(REST)  # as the last, which it is
            self._found["step"] = _milliseconds(self.stamps[0], self.stamps[-1])
            self._pool += [stamp for stamp in self.stamps if isinstance(stamp, torch.cuda.Event)]
            self.stamps = []
        return dict(self._found)


class PhaseClock:
    """Measures the phases of one step after the other.

    On a GPU each change of phase records an event on the current stream (about a microsecond for the host, nothing to
    wait for), so that a phase lasts from when the device reaches its first kernel to when it reaches the next
    phase's: the time of kernels and of gaps between them. On a CPU it reads the host's clock.

    Args:
        device: where the step runs.

    Attributes:
        ranges: open a ``record_function`` range for each phase, for a profiler's trace.
    """

    def __init__(self, device: torch.device) -> None:
        self.ranges = False
        self._cuda = device.type == "cuda"
        self._pool: list[torch.cuda.Event] = []
        self._times = PhaseTimes(self._pool)
        self._name: str | None = None  # of the running phase; none: a segment whose name is not known yet
        self._unnamed: list[int] = []  # stamps of the running segment
        self._segments: list[str] = []  # of the running step, in order
        self._expected: list[str] = []  # of the last step: a range must have its name when it begins
        self._range: Any = None

    def start(self) -> PhaseTimes:
        """Begins a step, and with it the phase of all that no other claims."""
        self._times = PhaseTimes(self._pool)
        self._segments, self._unnamed = [], []
        self._mark(REST)
        return self._times

    def stop(self) -> None:
        """Ends the step."""
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
        """The phase from here on."""
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
