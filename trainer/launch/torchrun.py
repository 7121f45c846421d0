"""Runs torchrun as a child process and passes signals on to its workers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.launch.settings import SIGNALS

KILL_AFTER_S = 3.0  # from a second Ctrl-C


class Torchrun:
    """torchrun in a process group of its own, out of reach of Ctrl-C; signals are for its workers alone.

    The workers finish the step, save and end; torchrun ends with them.

    Args:
        command: torchrun's.
        max_restarts: as torchrun was told.
        stop_file: gets a line at the first signal; empty: none.
    """

    def __init__(self, command: Sequence[str], max_restarts: int, stop_file: str) -> None:
        self.command, self.max_restarts, self.stop_file = command, max_restarts, stop_file
        self.stopping = False
        self.unstarted = 0  # signal that arrived before there were workers
        self.kill_at: float | None = None
        self.told: set[int] = set()  # workers that were asked to stop and must not be restarted

    def run(self) -> int:
        """Its exit status; 128 + n if signal n killed it, or arrived before there were workers."""
        # Each signal puts its number into this pipe, from where the loop handles one after the other.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, a shell's & SIGINT: they still do
                signal.signal(number, lambda *_: None)
        process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp)
        self.pid = process.pid
        while process.returncode is None:
            if select.select([reader], [], [], 0.5 if self.told or self.kill_at else None)[0]:
                for number in os.read(reader, 1024):
                    if number in SIGNALS:
                        self.stop(number)
            if self.told:
                self.prevent_restart()
            if self.kill_at and time.monotonic() > self.kill_at:
                kill_all(children(self.pid), signal.SIGKILL)
            # All children: the first process of a container also inherits orphans.
            for pid, status in ended_children():
                if pid == self.pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
        if self.unstarted:
            say(f"run_train.sh: interrupted ({signal.Signals(self.unstarted).name}); repeat the command to resume")
            return 128 + self.unstarted
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def stop(self, number: int) -> None:
        """First signal: the workers shall save and end. A second SIGINT ends them at once; others are ignored then."""
        first, self.stopping = not self.stopping, True
        if first and self.stop_file:
            record_stop(self.stop_file, number)
        workers = children(self.pid)
        if not workers:
            if first:
                self.unstarted = number
            kill(self.pid, signal.SIGUSR2)
        elif first:
            kill_all(workers, signal.SIGTERM)
            if self.max_restarts:
                self.told = set(workers)
        elif number == signal.SIGINT:
            if self.max_restarts:
                kill(self.pid, signal.SIGUSR2)
            # They say that they end; one that cannot answer, as in a collective, is killed.
            kill_all(workers, signal.SIGINT)
            self.kill_at = time.monotonic() + KILL_AFTER_S

    def prevent_restart(self) -> None:
        """Ends torchrun if it starts workers again after one of them failed before it could save."""
        restarted = set(children(self.pid)) - self.told
        if restarted:
            kill(self.pid, signal.SIGUSR2)
            self.told |= restarted


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):  # it has ended
        os.kill(pid, number)


def kill_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        kill(pid, number)


def children(pid: int) -> list[int]:
    """Child processes of a process."""
    if not os.path.exists("/proc/self/stat"):
        found = subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.PIPE, text=True)
        return [int(child) for child in found.stdout.split()]
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # After the command's name, which may hold spaces and parentheses: state, parent, ...
            if int(file.read().rpartition(b")")[2].split()[1]) == pid:
                found.append(int(name))
    return found


def ended_children() -> list[tuple[int, int]]:
    """(pid, wait status) of each child of this process that has ended."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(child)
    return ended


def record_stop(file: str, number: int) -> None:
    line = f"{time.strftime('%F %T')} {os.uname().nodename}: {signal.Signals(number).name}\n"
    try:
        with open(file, "a") as out:
            out.write(line)
    except OSError as error:
        say(f"run_train.sh: cannot write to STOP_FILE: {error}")


def count_stops(file: str) -> int:
    """Signals that STOP_FILE has recorded, on any machine."""
    try:
        return len(Path(file).read_bytes().splitlines()) if file else 0
    except OSError:
        return 0


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(sys.stderr.fileno(), (text + "\n").encode(errors="surrogateescape"))
