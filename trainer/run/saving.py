"""A run's checkpoints: written in the background while training goes on; a full disk is a warning, not an end."""

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
    """The checkpoints of a run. Every rank calls every method.

    Args:
        manager: writes and reads them.
        world: this process; rank 0 tells what happens.
        state: what to save.
    """

    def __init__(self, manager: CheckpointManager, world: World, state: Callable[[], dict[str, Any]]) -> None:
        self.manager, self.world, self.state = manager, world, state

    def save(self, step: int) -> None:
        """Writes a checkpoint and waits until it is on the disk.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.finish()
        start = time.perf_counter()
        path = self.manager.save(step, self.state())
        self._log(f"saved {path} in {time.perf_counter() - start:.1f} s")

    def try_to_save(self, step: int, in_background: bool) -> None:
        """The same, but the run survives a failure with a warning, and may go on while the disk is at work."""
        if not in_background:
            with self._only_warning():
                self.save(step)
            return
        self.finish()
        with self._only_warning():
            start = time.perf_counter()
            self.manager.save_async(step, self.state())
            self._log(
                f"step {step}: copied for a checkpoint in {time.perf_counter() - start:.1f} s, writing it meanwhile"
            )

    def finish(self) -> None:
        """Waits for what is written in the background, and tells how it ended."""
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
                logger.warning(f"{error} The run goes on, and tries again at its next checkpoint.")

    def _log(self, message: str) -> None:
        if self.world.is_main:
            logger.info(message)
