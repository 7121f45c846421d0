"""The folder of a run's checkpoints: their names, and the renames by which one begins and ceases to count."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from components.files import manifest

PARTIAL, REPLACED, REMOVING = ".partial", ".replaced", ".removing"
MARGIN_BYTES = 64 << 20  # of free space beyond a checkpoint's own: logs and pictures go on being written

logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint cannot be written, is damaged or absent, or does not fit what it is loaded into."""


class CheckpointFolder:
    """``step_00000100``, ``step_00000200``, ...; one process (rank 0) changes anything.

    Args:
        path: made when the first checkpoint begins.
        keep: how many of the newest :meth:`retire` leaves; 0: all.
        keep_every: steps; checkpoints of its multiples stay, besides the newest. 0: none.
    """

    def __init__(self, path: Path, keep: int, keep_every: int) -> None:
        if keep < 0:
            raise ValueError(f"keep must be 0 (all) or a number of checkpoints, not {keep}")
        if keep_every < 0:
            raise ValueError(f"keep_every must be 0 (none) or a number of steps, not {keep_every}")
        self.path, self.keep, self.keep_every = path, keep, keep_every

    def final(self, step: int) -> Path:
        """The path of a step's checkpoint."""
        return self.path / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Where a step's checkpoint is written before it counts."""
        return self.path / f"step_{step:08d}{PARTIAL}"

    def list(self) -> list[tuple[int, Path]]:
        """(step, path) of whatever bears a checkpoint's name, newest first."""
        try:
            names = set(os.listdir(self.path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"the checkpoint folder {self.path} cannot be read: {error.strerror}") from error
        found = []
        for name in names:
            match = re.fullmatch(rf"(step_(\d{{8,}}))({re.escape(REPLACED)})?", name)
            # A replaced one counts where a kill came between moving it away and putting the new one in place.
            if match and not (match[3] and match[1] in names):
                found.append((int(match[2]), self.path / name))
        return sorted(found, reverse=True)

    def begin(self, step: int, need: int) -> None:
        """Clears what killed runs left behind, and makes the folder to write into if ``need`` bytes fit."""
        for path in sorted(self.path.glob("step_*")):
            match = re.fullmatch(r"(step_\d{8,})((?:\.[a-z]+)+)", path.name)
            if match and match[2].endswith((PARTIAL, REMOVING)):
                _remove(path)
            elif match and match[2] == REPLACED:
                final = path.with_name(match[1])
                if final.exists():
                    _remove(path)
                else:
                    path.rename(final)
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if need + MARGIN_BYTES > free:
            need_gib, free_gib = (need + MARGIN_BYTES) / 2**30, free / 2**30
            raise OSError(errno.ENOSPC, f"it needs {need_gib:.2f} GiB, of which {free_gib:.2f} GiB are free")
        self.path.mkdir(parents=True, exist_ok=True)
        self.partial(step).mkdir()

    def commit(self, step: int, files: dict[str, dict[str, Any] | str]) -> None:
        """Makes the written folder a checkpoint; from here on it counts, and older ones may go."""
        partial, final = self.partial(step), self.final(step)
        for name, entry in files.items():
            if isinstance(entry, str):
                raise OSError(f"{name} cannot be read back: {entry}")
        manifest.write(partial, step, files)
        replaced = final.with_name(final.name + REPLACED)
        if os.path.lexists(final):
            final.rename(replaced)
        partial.rename(final)
        manifest.sync_folder(self.path)
        _remove(replaced)

    def retire(self, newest: Path) -> None:
        """Removes sound checkpoints beyond ``keep`` and ``keep_every``; a damaged one neither counts nor goes."""
        others = [(s, path) for s, path in self.list() if path != newest and manifest.problem(path) is None]
        for step, path in others[self.keep - 1 :] if self.keep else ():
            if self.keep_every and step % self.keep_every == 0:
                continue
            self._drop(path)

    def discard(self, beyond: int) -> None:
        """Removes the checkpoints of later steps, sound or not."""
        for step, path in self.list():
            if step > beyond:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        # Renamed first: a kill in the middle leaves nothing that bears a checkpoint's name.
        doomed = path.with_name(path.name + REMOVING)
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("checkpoint %s cannot be removed: %s", path, error.strerror)
        else:
            _remove(doomed)


def _remove(path: Path) -> None:
    """Removes a folder or file, if it is there; what cannot be removed is only a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error.strerror)
