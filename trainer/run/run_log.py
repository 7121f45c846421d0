"""log.txt of a run folder, held back until the run is accepted."""

from __future__ import annotations

import logging
from pathlib import Path


class RunLog(logging.Handler):
    """Writes log lines to a file, but keeps them in memory until :meth:`start`: a refused resume changes no file.

    Args:
        path: file to append to; its folder must exist when :meth:`start` is called.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file: logging.FileHandler | None = None
        self._held: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            self._held.append(record)
        else:
            self._file.emit(record)

    def start(self) -> None:
        """Open the file, and write what was held back."""
        if self._file is None:
            self._file = logging.FileHandler(self.path, encoding="utf-8", errors="backslashreplace")
            self._file.setFormatter(self.formatter)
            held, self._held = self._held, []
            for record in held:
                self._file.emit(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def start_run_log() -> None:
    """Start every :class:`RunLog` of the root logger."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RunLog):
            handler.start()
