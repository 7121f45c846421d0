"""Checkpoint directory layout; commit and delete are atomic renames."""

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
MARGIN_BYTES = 64 << 20  # required free space beyond the checkpoint itself, for logs and images

logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint cannot be written, is damaged or missing, or does not match what it is loaded into."""


class CheckpointFolder:
    """Directory of checkpoints ``step_00000100``, ``step_00000200``, ...; only rank 0 modifies it.

    Args:
        path: created with the first checkpoint.
        keep: number of newest checkpoints to keep; 0 keeps all.
        keep_every: additionally keep checkpoints whose step is a multiple of this; 0 disables it.
    """

    def __init__(self, path: Path, keep: int, keep_every: int) -> None:
        if keep < 0:
            raise ValueError(f"keep must be 0 (all) or a positive number of checkpoints, got {keep}")
        if keep_every < 0:
            raise ValueError(f"keep_every must be 0 (none) or a positive number of steps, got {keep_every}")
        self.path, self.keep, self.keep_every = path, keep, keep_every

    def final(self, step: int) -> Path:
        """The path of a step's checkpoint."""
        return self.path / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """The path where a step's checkpoint is written before it is committed."""
        return self.path / f"step_{step:08d}{PARTIAL}"

    def list(self) -> list[tuple[int, Path]]:
        """(step, path) of every entry named like a checkpoint, newest first."""
        try:
            names = set(os.listdir(self.path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"the checkpoint folder {self.path} cannot be read: {error.strerror}") from error
        found = []
        for name in names:
            match = re.fullmatch(rf"(step_(\d{{8,}}))({re.escape(REPLACED)})?", name)
            # A replaced checkpoint counts if the process was killed between the two renames of `commit`.
            if match and not (match[3] and match[1] in names):
                found.append((int(match[2]), self.path / name))
        return sorted(found, reverse=True)

    def begin(self, step: int, need: int) -> None:
        """Remove leftovers of killed runs and create the partial folder of ``step``.

        Raises:
            OSError: fewer than ``need`` bytes, plus a margin, are free.
        """
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
            raise OSError(errno.ENOSPC, f"it needs {need_gib:.2f} GiB, but only {free_gib:.2f} GiB are free")
        self.path.mkdir(parents=True, exist_ok=True)
        self.partial(step).mkdir()

    def commit(self, step: int, files: dict[str, dict[str, Any] | str]) -> None:
        """Commit the partial folder as the checkpoint of ``step``; replace an existing one.

        Args:
            step: optimizer steps taken.
            files: result of :func:`components.files.manifest.checksum` by file name.
        """
        partial, final = self.partial(step), self.final(step)
        for name, entry in files.items():
            if isinstance(entry, str):
                raise OSError(f"{name} could not be read back: {entry}")
        manifest.write(partial, step, files)
        replaced = final.with_name(final.name + REPLACED)
        if os.path.lexists(final):
            final.rename(replaced)
        partial.rename(final)
        manifest.sync_folder(self.path)
        _remove(replaced)

    def retire(self, old: list[tuple[int, Path]]) -> None:
        """Remove the checkpoints (step, path) that ``keep_every`` does not keep; damaged ones stay."""
        for step, path in old:
            if not (self.keep_every and step % self.keep_every == 0) and manifest.problem(path) is None:
                self._drop(path)

    def discard(self, beyond: int) -> None:
        """Remove all checkpoints of steps later than ``beyond``, even damaged ones."""
        for step, path in self.list():
            if step > beyond:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        # Renamed first, so that a kill halfway leaves nothing named like a checkpoint.
        doomed = path.with_name(path.name + REMOVING)
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("could not remove checkpoint %s: %s", path, error.strerror)
        else:
            _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a folder or file if it exists; failing to do so only logs a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error.strerror)
