"""Starts training for run_train.sh: the trainer itself, or torchrun with one process per GPU.

    python -m trainer.launch check CONFIG ...     checks arguments and environment variables, starts nothing
    python -m trainer.launch start CONFIG ...     checks them, then trains

`run_train.sh --help` describes variables and exit statuses. This package imports the standard library alone: it checks
before any package is installed, and it delays a run in one process, which replaces it (exec), by milliseconds.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.launch.settings import (
    EXPLAINED,
    STATUS_FILE,
    Settings,
    UsageError,
    change_environment,
    change_torchrun_environment,
    check_config,
    count_gpus,
    torchrun_command,
)
from trainer.launch.torchrun import Torchrun, count_stops, say

STOPPED = 75  # status of a stopped run, if STOP_FILE tells it from a complete one
MESSAGES = ("error: ", "interrupted")  # beginnings of what a trainer says at its end
TAIL_BYTES, TAIL_LINES = 2000, 5  # shown of a process that failed


def summarize(status: int, logs: Path, shown: str = "0") -> None:
    """Says where the logs are and how failed processes ended; deletes the logs of a run without failures.

    ``shown``: local ranks whose output was shown.
    """
    attempts = len(list(logs.glob("*/attempt_*"))) or 1  # counted from 0
    if status in EXPLAINED:
        explain(logs, attempts, shown)
    elif status == 0 and attempts == 1:
        shutil.rmtree(logs, ignore_errors=True)
    elif status == 0:
        say(f"run_train.sh: processes died and were restarted; all that each printed is in {logs}")
    else:
        # The process that failed first is often not one whose output was shown, and torchrun's own report is long.
        words = None
        for file in sorted(logs.glob(f"*/attempt_{attempts - 1}/*/stderr.log")):
            before = words
            words = last_words(file) or before
            if words != before:
                say(f"\nLast words of process {file.parent.name}:\n{words}")
        say(f"run_train.sh: ended with status {status}; all that each process printed is in {logs}")


def explain(logs: Path, attempts: int, shown: str) -> None:
    """Shows the message with which a process ended, unless it was shown; deletes the logs."""
    words = {f.parent.name: last_words(f) for f in sorted(logs.glob(f"*/attempt_{attempts - 1}/*/stderr.log"))}
    found = {rank: text[at:] for rank, text in words.items() if (at := max(map(text.rfind, MESSAGES))) >= 0}
    if found and not set(found) & set(shown.split(",")):
        say(next(iter(found.values())))
    shutil.rmtree(logs, ignore_errors=True)


def last_words(file: Path) -> str:
    text = file.read_bytes()[-TAIL_BYTES:].decode(errors="surrogateescape")
    return "\n".join(text.replace("\r", "\n").rstrip("\n").split("\n")[-TAIL_LINES:])


def start(settings: Settings, arguments: Sequence[str]) -> int:
    """Trains; returns the exit status of run_train.sh, or replaces this process where one process trains."""
    python = os.environ.get("PYTHON") or sys.executable
    processes = settings.processes or count_gpus(python, os.environ) or 1
    change_environment(os.environ)
    if processes == settings.max_nodes == 1 and not settings.max_restarts and not settings.stop_file:
        os.execvp(python, [python, "-m", "trainer", "train", *arguments])
    change_torchrun_environment(os.environ, processes)
    folder = os.environ.get("TMPDIR") or "/tmp"
    try:
        logs = tempfile.mkdtemp(prefix="titanrepa.", dir=folder)
    except OSError as error:
        say(f"run_train.sh: cannot make a folder for logs in {folder} (TMPDIR): {error}")
        return 1
    recorded = count_stops(settings.stop_file)
    verdict = os.environ[STATUS_FILE] = os.path.join(logs, "status")
    command = torchrun_command(python, settings, processes, logs, arguments)
    status = Torchrun(command, settings.max_restarts, settings.stop_file).run()
    if status == 0 and os.path.exists(verdict):
        status = int(Path(verdict).read_text())
        shutil.rmtree(logs, ignore_errors=True)
    else:
        summarize(status, Path(logs), settings.log_rank)
    return STOPPED if status == 0 and count_stops(settings.stop_file) != recorded else status


def main(mode: str, *arguments: str) -> int:
    """Returns the exit status; arguments are those of run_train.sh."""
    # A parent may have ignored SIGCHLD, which would hide the exit statuses of children.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # As for a shell: no traceback at Ctrl-C before training begins, nor at a closed pipe.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        check_config(arguments[0])
        settings = Settings.read(os.environ)
    except UsageError as error:
        say(f"run_train.sh: {error}")
        return 2
    return start(settings, arguments) if mode == "start" else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
