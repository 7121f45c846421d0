"""What went wrong without ending a run: warned about once a kind, counted, and listed in the run's last line."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("titanrepa")


class Troubles:
    """Failures and skipped steps of a run, across restarts.

    Attributes:
        failures: number of failures by kind, such as "metrics.jsonl" or "pictures".
        skipped: number of skipped steps.
        skipped_since: first step of the latest series of skipped steps, counted from 1; 0: the last step was applied.
        alarms: number of alarms by name.
    """

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}
        self.alarms: dict[str, int] = {}
        self.skipped = 0
        self.skipped_since = 0
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def only_warning(self, kind: str) -> Iterator[None]:
        """Context manager that turns an error into a warning; ``kind`` names what failed."""
        try:
            yield
        except Exception as error:
            self.failed(kind, error)

    def failed(self, kind: str, error: BaseException | str) -> None:
        """Count a failure; the first of its kind in this process is logged."""
        self.count(kind)
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(f"{kind} failed: {reason(error)}; training continues, and further failures are counted")

    def count(self, kind: str) -> None:
        """Count a failure that has been logged elsewhere."""
        self.failures[kind] = self.failures.get(kind, 0) + 1

    def stepped(self, step: int, skipped: bool) -> None:
        """Count step ``step``, from 1."""
        if skipped:
            self.skipped += 1
            self.skipped_since = self.skipped_since or step
        else:
            self.skipped_since = 0

    def raised(self, alarm: str) -> None:
        """Count an alarm."""
        self.alarms[alarm] = self.alarms.get(alarm, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "failures": dict(self.failures),
            "alarms": dict(self.alarms),
            "skipped": self.skipped,
            "skipped_since": self.skipped_since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failures, self.alarms = dict(state["failures"]), dict(state["alarms"])
        self.skipped, self.skipped_since = state["skipped"], state["skipped_since"]

    def summary(self, steps: int, unreadable: int, seen: int) -> list[str]:
        """What was wrong with a run of ``steps`` steps that read ``seen`` images, ``unreadable`` of them replaced."""
        found = []
        if self.skipped:
            since = f", the last ones since step {self.skipped_since} without a break" if self.skipped_since else ""
            share = 100 * self.skipped / max(steps, self.skipped)
            found.append(f"{self.skipped} steps ({share:.2g} %) were skipped because a value was not finite{since}")
        if self.alarms:
            listed = ", ".join(f"{name} {count}x" if count > 1 else name for name, count in self.alarms.items())
            found.append(f"alarms: {listed} (alarms/ of the run folder)")
        if unreadable:
            found.append(f"{unreadable} of {seen} images were unreadable and replaced")
        if self.failures:
            found.append("failed: " + ", ".join(f"{kind} {count}x" for kind, count in self.failures.items()))
        return found


def reason(error: BaseException | str) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({os.fspath(error.filename)})' if error.filename else ''}"
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, str) else f"{type(error).__name__}: {text}"
