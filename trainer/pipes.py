"""What a command does when the reader of its output has ended, as in ``python -m trainer plugins | head -1``."""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
from collections.abc import Callable


def ends_with_its_reader(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator: end quietly, with the status of a program that SIGPIPE ended, if the reader of stdout has ended."""

    @functools.wraps(main)
    def wrapped(*arguments: object) -> int:
        try:
            try:
                status = main(*arguments)
            except SystemExit:  # after --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            if not _reader_ended():  # another pipe: a fault to show
                raise
            # What is still buffered would make Python complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return wrapped


def _reader_ended() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # reports errors only
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False
