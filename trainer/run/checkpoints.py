"""The checkpoints of a run: saving, optionally in the background, and loading."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.checkpoint import CheckpointError, CheckpointManager
from components.data.classes import Classes
from components.distributed.parallel import World
from components.distributed.ranks import Ranks
from components.files.lock import check_owned
from trainer.config import Config, ConfigError
from trainer.run.troubles import Troubles

logger = logging.getLogger("titanrepa")

OPTIONAL = {
    "version": "",
    "troubles": None,
    "classes": None,
}  # parts of the state that older checkpoints lack, with what replaces them


class Checkpoints:
    """Saves and loads the checkpoints of a run. All methods are collective.

    Args:
        config: of the run.
        world: this process; rank 0 logs.
        state: returns the state to save; its tensors are also the template that loading fills.
        troubles: counts failed saves.

    Attributes:
        saved: step of the newest checkpoint of this process, saved or loaded; None before the first.
    """

    def __init__(
        self, config: Config, world: World, state: Callable[[], dict[str, Any]], troubles: Troubles | None = None
    ) -> None:
        r = config.run
        self.folder = Path(r.dir) / "checkpoints"
        self.manager = CheckpointManager(self.folder, keep=r.keep_checkpoints, keep_every=r.keep_every)
        self.in_background = r.async_checkpoints
        self.world, self.state = world, state
        self.troubles = troubles or Troubles()
        self.saved: int | None = None
        self._writing: int | None = None  # step of a save in the background

    def newest(self, up_to: int | None = None) -> Path | None:
        """Newest valid checkpoint, of at most ``up_to`` steps; None if there is none."""
        return next(self.manager.candidates(up_to=up_to), None)

    def load(self, path: Path) -> dict[str, Any]:
        """Load a checkpoint into the tensors of the run's state; returns the state with "version", "" if unknown."""
        template = self.state()
        for name in OPTIONAL:  # older checkpoints have none
            del template[name]
        state = self.manager.load(path, template)
        found = self.manager.read(path, list(OPTIONAL))
        self.saved = state["progress"]["step"]
        return state | {name: found.get(name, missing) for name, missing in OPTIONAL.items()}

    def refuse_damaged(self) -> None:
        """Raise if there are checkpoints and none can be used, since a run from step 1 would replace them.

        Raises:
            CheckpointError: there are.
        """
        if (count := self.manager.count()) > 0:
            raise CheckpointError(
                f"{self.folder} holds {count} checkpoint{'s' * (count > 1)}, none sound (see the warnings above): move "
                "them away to start from step 1, or name another run.dir"
            )

    def check_classes(self, path: Path, now: Classes, accept: bool) -> None:
        """Compare the classes that a checkpoint was trained on, if it records them, with those of the dataset.

        Args:
            path: of the checkpoint.
            now: classes of the dataset.
            accept: only log a difference.

        Raises:
            ConfigError: they differ.
        """
        before = Classes.from_record(self.manager.read(path, ["classes"]).get("classes"))
        if changed := before.difference(now):
            if not accept:
                raise ConfigError(
                    f"the dataset's classes differ from those of {path} (checkpoint -> now): {changed}. Restore the "
                    "dataset, choose another run.dir, or, if the labels still mean the same, accept the change once: "
                    "--accept-classes"
                )
            self._log(f"classes changed since that checkpoint: {changed}")
        elif before.counts and now.counts and before.counts != now.counts:
            images = f"{sum(before.counts)} -> {sum(now.counts)} images"
            self._log(f"images per class changed since that checkpoint, and with them the data order: {images}")

    def discard(self, beyond: int) -> None:
        """Delete the checkpoints of later steps than ``beyond``."""
        self.manager.discard(beyond=beyond)

    def save(self, step: int) -> None:
        """Write a checkpoint and wait until it is on disk.

        Raises:
            CheckpointError: the checkpoint cannot be written.
            LockError: another process took over the run folder.
        """
        self.finish()
        Ranks(None).first(check_owned)
        start = time.perf_counter()
        path = self.manager.save(step, self.state())
        self.saved = step
        self._log(f"saved {path} in {time.perf_counter() - start:.1f} s")

    def try_to_save(self, step: int) -> None:
        """Write a periodic checkpoint, in the background if configured; a failure is logged and the run continues.

        Raises:
            LockError: another process took over the run folder.
        """
        if not self.in_background:
            with self._only_warning():
                self.save(step)
            return
        self.finish()
        Ranks(None).first(check_owned)
        with self._only_warning():
            start = time.perf_counter()
            self.manager.save_async(step, self.state())
            self._writing = step
            self._log(
                f"step {step}: copied the checkpoint in {time.perf_counter() - start:.1f} s, writing in background"
            )

    def finish(self) -> None:
        """Wait for a checkpoint that is being written in the background, and log the outcome."""
        with self._only_warning():
            path: Path | None = self.manager.wait()
            if path is not None:
                self.saved = self._writing
                self._log(f"saved {path}")

    @contextlib.contextmanager
    def _only_warning(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self.troubles.count("checkpoints")
            if self.world.is_main:
                logger.warning(f"{error} Training continues; the next checkpoint is another attempt.")

    def _log(self, message: str) -> None:
        if self.world.is_main:
            logger.info(message)
