"""Signals of every command. Only the standard library is imported, since signals must be handled before torch is.

SIGINT (Ctrl-C), SIGTERM (a scheduler), SIGHUP (a closed terminal) and SIGUSR1 (Slurm's notice) mean the same. A command
that can be repeated ends with one line and status 128 + number; training replaces that by a graceful stop while it has
steps to save (:class:`trainer.run.process.StopSignals`). Linux and macOS only: Windows lacks SIGHUP and SIGUSR1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

if os.name == "nt":
    sys.exit("error: titanrepa runs on Linux and macOS; on Windows, use WSL 2")

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_S = 5.0  # until a process that cannot react, as while it waits for another rank, ends at once


class Interrupted(KeyboardInterrupt):
    """A signal ended the command.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Interruptions:
    """Context manager in which signals end the command: the first by :class:`Interrupted`, the second at once.

    During an import a signal ends the process at once: libraries report an exception there as a broken installation.
    Signals that the parent process ignored, as nohup does with SIGHUP, stay ignored. Does nothing outside the main
    thread.

    Args:
        hint: what the user can do, such as "repeat the command to resume"; may be empty.

    Attributes:
        number: of the first signal that arrived; 0: none.
    """

    def __init__(self, hint: str = "") -> None:
        self.hint = hint
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.getsignal(s) for s in CAUGHT}
            for s in CAUGHT:
                if self._before[s] is not signal.SIG_IGN:
                    signal.signal(s, self._handle)
            # Python runs handlers between bytecodes only; the number of a signal is written here at once.
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for s, before in self._before.items():
            # Training leaves signals ignored after a graceful stop, so that a late one does not disturb its exit.
            if signal.getsignal(s) == self._handle:
                signal.signal(s, before)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)
            self._watcher.join(timeout=1)  # a thread that returns while Python exits may abort the process
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number or importing(frame):
            end_at_once(
                number, f"interrupted again ({name(number)}), ended at once" if self.number else self.line(number)
            )
        self.number = number
        raise Interrupted(number)

    def _watch(self, reader: int) -> None:
        """End the process some time after a signal, unless training handles it. Runs in a thread."""
        while arrived := os.read(reader, 1024):
            for number in arrived:
                if number in CAUGHT and signal.getsignal(number) == self._handle:
                    time.sleep(GRACE_S)
                    if self._before:
                        end_at_once(number, f"{self.line(number)} (ended after {GRACE_S:g} s without an answer)")
        os.close(reader)

    def line(self, number: int) -> str:
        """What an interrupted command says."""
        return f"interrupted ({name(number)}){self.hint and '; '}{self.hint}"

    def report(self) -> int:
        """Print the line with which an interrupted command ends; returns its exit status."""
        number = self.number or signal.SIGINT  # a KeyboardInterrupt that no signal raised
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\n{self.line(number)}", file=sys.stderr, flush=True)
        return 128 + number


def importing(frame: FrameType | None) -> bool:
    """Whether a frame belongs to an import statement in progress."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def end_at_once(number: int, message: str) -> NoReturn:
    """Write one line to stderr and end the process with status 128 + number; no cleanup runs.

    Threads of a save or of a data loader would abort an orderly exit, and every file is renamed only when complete.
    """
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{message}\n".encode())
    os._exit(128 + number)


def name(number: int) -> str:
    """Name of a signal, such as "SIGTERM"."""
    return signal.Signals(number).name
