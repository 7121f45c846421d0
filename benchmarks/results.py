"""Results of a benchmark that may be cut short at any moment: whole on the disk after every part."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


class TimeUp(BaseException):
    """The time limit has passed. No Exception, so that no library swallows it."""


class LeftOut(Exception):
    """A part cannot run, for a reason that is no fault of its own."""


class Results:
    """Runs parts one after the other and keeps what they return in a JSON file.

    The file is replaced whole, by a rename, before and after each part. It maps each part's name to ``status``,
    ``seconds`` and, where it is done, ``result``. A status is "running", "done", "left out" (too little time, or what
    it needs failed), "out of memory", "failed" (with ``error`` and ``traceback``), "out of time" or "interrupted".

    Args:
        file: where the JSON goes.
        seconds: time limit from now on; a part that is still running then is stopped.
        only: run parts whose name contains one of these texts, and those that others need; empty: all.
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
        """Runs one part; returns its result, or None.

        Args:
            needs: seconds that must be left, or else the part is left out.
            required: other parts need it, so ``only`` does not apply.
            share: of the time that is left; a part that takes longer is stopped.
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
        except LeftOut as error:
            entry = {"status": "left out", "error": str(error)}
        except Exception as error:
            entry = failure(error)
        entry["seconds"] = round(time.monotonic() - start, 1)
        self._end(name, entry)
        self.after()
        return found

    def write(self) -> None:
        """Replaces the file by what is known now."""
        found = self.about | {"seconds": round(time.monotonic() - self.began, 1), "parts": self.parts}
        new = self.file.with_suffix(".tmp")
        new.write_text(json.dumps(plain(found), indent=1, allow_nan=False) + "\n")
        os.replace(new, self.file)

    def _end(self, name: str, entry: dict[str, Any]) -> None:
        self.parts[name] = entry
        self.write()
        shown = {key: value for key, value in entry.items() if key != "traceback"}
        print(f"[{time.monotonic() - self.began:5.0f} s] {name}: {json.dumps(plain(shown))}", flush=True)

    @contextlib.contextmanager
    def _alarm(self, seconds: float) -> Iterator[None]:
        """Inside, :class:`TimeUp` is raised after some seconds, once Python runs again."""

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
    """The entry of a part that raised."""
    # The compiler wraps the error in one of its own.
    if isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error):
        return {"status": "out of memory", "error": next(line for line in str(error).splitlines() if "memory" in line)}
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:600], "traceback": text[-6000:]}


def plain(value: Any) -> Any:
    """What JSON has: numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
