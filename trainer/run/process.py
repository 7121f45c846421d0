"""Process-wide changes during a run: signal handlers and Python's garbage collection."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator

from trainer.signals import CAUGHT, end_at_once

_left_ignored: set[int] = set()  # by an earlier run of this process


class StopSignals:
    """Context manager that turns the signals of :mod:`trainer.signals` into a request for a graceful stop.

    A second Ctrl-C ends the process at once. After a request, the other signals stay ignored even outside the context:
    schedulers often send several, and one that arrives during saving or exit would kill the process.

    Args:
        log: called with a message for the user.
        lost: returns what a second Ctrl-C loses, for its message.

    Attributes:
        requested: whether a signal has arrived.
    """

    def __init__(self, log: Callable[[str], None], lost: Callable[[], str] = lambda: "") -> None:
        self.log, self.lost = log, lost
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for s in CAUGHT:
                before = signal.getsignal(s)
                if before is not signal.SIG_IGN or s in _left_ignored:  # nohup leaves SIGHUP ignored
                    self._before[s] = before
                    signal.signal(s, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for s, before in self._before.items():
            ignored = self.requested and s != signal.SIGINT
            signal.signal(s, signal.SIG_IGN if ignored else before)
            if ignored:
                _left_ignored.add(s)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            end_at_once(number, f"interrupted again, ended at once; {self.lost()}")
        if not self.requested:
            self.requested = True
            self.log(f"{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C again to stop at once)")


@contextlib.contextmanager
def garbage_collected(every: int) -> Iterator[Callable[[int], None]]:
    """Context manager that replaces automatic garbage collection by one every ``every`` steps.

    Yields a function to call after each step, so that all ranks pause together. 0: leave collection to Python.
    """
    if not every:
        yield lambda step: None
        return
    gc.collect()
    gc.freeze()  # exclude the run's long-lived objects from later collections
    gc.disable()
    try:
        yield lambda step: gc.collect() if step % every == 0 else None
    finally:
        gc.enable()
        gc.unfreeze()
