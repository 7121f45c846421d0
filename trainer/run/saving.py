"""Saving of a run's checkpoints, optionally in the background; a failed periodic save only causes a warning."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.checkpoint import CheckpointError, CheckpointManager
from components.distributed.parallel import World

logger = logging.getLogger("titanrepa")


class Saves:
    """Saves the checkpoints of a run. All methods are collective.

    Args:
        manager: reads and writes checkpoints.
        world: this process; rank 0 logs.
        state: returns the state to save.
    """

    def __init__(self, manager: CheckpointManager, world: World, state: Callable[[], dict[str, Any]]) -> None:
        self.manager, self.world, self.state = manager, world, state

    def save(self, step: int) -> None:
        """Write a checkpoint and wait until it is on disk.

        Raises:
            CheckpointError: the checkpoint cannot be written.
        """
        self.finish()
        start = time.perf_counter()
        path = self.manager.save(step, self.state())
        self._log(f"saved {path} in {time.perf_counter() - start:.1f} s")

    def try_to_save(self, step: int, in_background: bool) -> None:
        """Write a checkpoint, optionally in the background; a failure is logged as a warning and the run continues."""
        if not in_background:
            with self._only_warning():
                self.save(step)
            return
        self.finish()
        with self._only_warning():
            start = time.perf_counter()
            self.manager.save_async(step, self.state())
            self._log(
                f"step {step}: copied the checkpoint in {time.perf_counter() - start:.1f} s, writing in background"
            )

    def finish(self) -> None:
        """Wait for a checkpoint that is being written in the background, and log the outcome."""
        with self._only_warning():
            path: Path | None = self.manager.wait()
            if path is not None:
                self._log(f"saved {path}")

    @contextlib.contextmanager
    def _only_warning(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if self.world.is_main:
                logger.warning(f"{error} Training continues; the next checkpoint is another attempt.")

    def _log(self, message: str) -> None:
        if self.world.is_main:
            logger.info(message)
