"""Results of a benchmark that may be stopped at any moment: a JSON file that is complete after every part."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from components.files.atomic import atomic_write


class TimeUp(BaseException):
    """The time limit has passed. A BaseException, so that libraries do not swallow it."""


class Results:
    """Runs parts one after the other and stores their results in a JSON file.

    The file is replaced atomically before and after each part. It maps each part's name to ``status``, ``seconds``
    and, if done, ``result``. A status is "running", "done", "left out" (too little time, or a prerequisite failed),
    "out of memory", "failed" (with ``error`` and ``traceback``), "out of time" or "interrupted".

    Args:
        file: JSON file to write.
        seconds: time limit from now on; a part still running then is stopped.
        only: run only parts whose name contains one of these texts, and required ones; empty: all.
        after: called after each part, to free memory.
    """

    def __init__(
        self, file: Path, seconds: float, only: Sequence[str] = (), after: Callable[[], None] = lambda: None
    ) -> None:
        self.file, self.deadline, self.only, self.after = file, time.monotonic() + seconds, only, after
        self.began, self.parts, self.about = time.monotonic(), {}, {}
        file.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def left(self) -> float:
        """Seconds until the time limit."""
        return self.deadline - time.monotonic()

    def part(self, name: str, needs: float, run: Callable[[], Any], required: bool = False, share: float = 1.0) -> Any:
        """Run one part; returns its result, or None if it did not finish.

        Args:
            name: of the part.
            needs: skip the part if fewer seconds than this are left.
            run: computes the result.
            required: run it regardless of ``only``, since other parts need it.
            share: stop the part after this fraction of the time left.
        """
        if self.only and not required and not any(text in name for text in self.only):
            return None
        if self.left() < needs:
            return self._end(name, {"status": "left out", "left s": round(self.left()), "needs s": needs})
        start, found = time.monotonic(), None
        self.parts[name] = {"status": "running"}
        self.write()
        try:
            with self._alarm(share * self.left()):
                found = run()
            entry = {"status": "done", "result": found}
        except TimeUp:
            entry = {"status": "out of time"}
        except KeyboardInterrupt:
            self._end(name, {"status": "interrupted"})
            raise
        except Exception as error:
            entry = failure(error)
        entry["seconds"] = round(time.monotonic() - start, 1)
        self._end(name, entry)
        self.after()
        return found

    def write(self) -> None:
        """Replace the file by the current results."""
        found = self.about | {"seconds": round(time.monotonic() - self.began, 1), "parts": self.parts}
        with atomic_write(self.file, fsync=False) as partial:
            partial.write_text(json.dumps(plain(found), indent=1, allow_nan=False) + "\n")

    def _end(self, name: str, entry: dict[str, Any]) -> None:
        self.parts[name] = entry
        self.write()
        shown = {key: value for key, value in entry.items() if key != "traceback"}
        print(f"[{time.monotonic() - self.began:5.0f} s] {name}: {json.dumps(plain(shown))}", flush=True)

    @contextlib.contextmanager
    def _alarm(self, seconds: float) -> Iterator[None]:
        """Context manager that raises :class:`TimeUp` after some seconds, as soon as Python code runs."""

        def ring(*_: Any) -> None:
            raise TimeUp

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def failure(error: Exception) -> dict[str, Any]:
    """Entry of a part that raised an exception."""
    # torch.compile wraps an out-of-memory error in its own exception.
    if isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error):
        return {"status": "out of memory", "error": next(line for line in str(error).splitlines() if "memory" in line)}
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:600], "traceback": text[-6000:]}


def plain(value: Any) -> Any:
    """Convert a value for JSON; non-finite numbers become text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
