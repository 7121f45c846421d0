"""log.txt of a run folder, held back until the run is accepted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from trainer.run.terminal import LogFile


class RunLog(logging.Handler):
    """Writes log lines to a file, but keeps them in memory until :meth:`start`: a refused resume changes no file.

    Args:
        path: file to append to; its folder must exist when :meth:`start` is called.
        failed: called with the error if a line cannot be written.
    """

    def __init__(self, path: Path, failed: Callable[[BaseException | str], None]) -> None:
        super().__init__()
        self.path, self.failed = path, failed
        self._file: LogFile | None = None
        self._held: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            self._held.append(record)
        else:
            self._file.handle(record)

    def start(self) -> None:
        """Open the file, and write what was held back."""
        if self._file is None:
            self._file = LogFile(self.path, self.failed)
            self._file.setFormatter(self.formatter)
            held, self._held = self._held, []
            for record in held:
                self._file.handle(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def start_run_log() -> None:
    """Start every :class:`RunLog` of the root logger."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RunLog):
            handler.start()


def end_run_log() -> None:
    """Remove every :class:`RunLog` from the root logger: the next run of this process has its own."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, RunLog)]:
        root.removeHandler(handler)
        handler.close()
