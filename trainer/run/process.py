"""Process-wide changes during a run: signal handlers and Python's garbage collection."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Callable, Iterator

# Ctrl-C; termination by a scheduler; Slurm's notice before the time limit.
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context manager that turns SIGINT, SIGTERM and SIGUSR1 into a request for a graceful stop.

    A second Ctrl-C raises KeyboardInterrupt. After a request, SIGTERM and SIGUSR1 stay ignored even outside the
    context: schedulers often send several, and one that arrives during saving or exit would kill the process.

    Args:
        log: called with a message for the user.

    Attributes:
        requested: whether a signal has arrived.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.requested = False

    def __enter__(self) -> StopSignals:
        self._before = {s: signal.signal(s, self._handle) for s in CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for s, before in self._before.items():
            signal.signal(s, signal.SIG_IGN if self.requested and s != signal.SIGINT else before)

    def _handle(self, signum: int, frame: object) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self.log(f"{signal.Signals(signum).name}: finishing this step, then saving (Ctrl-C again to stop at once)")


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
