"""What a run changes about its process: signals, and Python's garbage collection."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Callable, Iterator

# Ctrl-C; schedulers' "end now"; Slurm's notice ahead of the time limit.
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Inside, a signal asks for a stop; outside, signals do what they did.

    A second Ctrl-C raises KeyboardInterrupt. Once a stop was asked for, later signals of schedulers are ignored for
    good: they often send several, and one that comes while the process saves or ends would kill it.

    Args:
        log: told what is going to happen.

    Attributes:
        requested: whether a signal came.
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
    """Python's own collecting is off inside; gives what to call after each step, which collects on every n-th.

    Ranks then pause together. 0 leaves it to Python.
    """
    if not every:
        yield lambda step: None
        return
    gc.collect()
    gc.freeze()  # what a run is built of stays: no need to look through it again
    gc.disable()
    try:
        yield lambda step: gc.collect() if step % every == 0 else None
    finally:
        gc.enable()
        gc.unfreeze()
