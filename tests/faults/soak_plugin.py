"""Dataset and recipe of the soak: slow, and with faults that soak.py switches on by files in SOAK_FOLDER."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import torch

from components.contracts import Batch, DatasetItem, Modules, RandomNumbers, Update
from components.registry import datasets, recipes
from plugins.datasets.shapes import Shapes
from plugins.recipes.repae import RepaE

FOLDER = Path(os.environ["SOAK_FOLDER"])
DELAY = float(os.environ.get("SOAK_DELAY", "0"))  # seconds per step, so that faults meet a run in all its states
FULL, GONE = FOLDER / "disk_full", FOLDER / "data_gone"


def full(call):
    """Let a call of the operating system fail while the disk is full."""

    def checked(*given, **named):
        if FULL.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*given, **named)

    return checked


os.fsync, os.replace, os.rename = full(os.fsync), full(os.replace), full(os.rename)


@datasets.register("soak_shapes")
class SoakShapes(Shapes):
    """Shapes that cannot be read while the data is gone.

    Args:
        size: number of images.
    """

    def __init__(self, resolution: int, *, size: int = 2000) -> None:
        super().__init__(resolution, size=size)

    def __getitem__(self, index: int) -> DatasetItem:
        if GONE.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().__getitem__(index)


@recipes.register("soak_repae")
class SoakRepaE(RepaE):
    """REPA-E with a step in 97 whose images are NaN, with and without other faults, so that it is skipped."""

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        time.sleep(DELAY)
        if step % 97 == 50:
            batch = batch._replace(images=torch.full_like(batch.images, torch.nan))
        super().step(m, batch, random, update, step)
