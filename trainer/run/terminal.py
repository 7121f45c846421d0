"""Output to a terminal that may be gone: after SIGHUP or behind a closed pipe, writing fails, but training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """Context manager for writing to stdout or stderr: if they are gone, all further output is discarded."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        os.close(nowhere)


class Bar(tqdm):
    """Progress bar of a terminal that may be gone."""

    def display(self, *arguments: object, **options: object) -> object:
        with surviving():
            return super().display(*arguments, **options)

    def close(self) -> None:
        with surviving():
            super().close()


class Terminal(logging.Handler):
    """Writes log lines to the terminal, without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "on_bar", False):  # already on the progress bar
            with surviving():
                tqdm.write(self.format(record))


class LogFile(logging.FileHandler):
    """Writes log lines to a file.

    Args:
        path: of the file.
        failed: called with the error if a line cannot be written.
    """

    def __init__(self, path: Path, failed: Callable[[BaseException | str], None]) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.failed = failed

    def handleError(self, record: logging.LogRecord) -> None:
        self.failed(sys.exc_info()[1] or "unknown error")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # lines that could not be written have been reported
            super().close()
