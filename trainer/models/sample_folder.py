"""Folder of samples that supports interruption and resumption, and that common evaluation scripts can read."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.data.pixels import to_float
from components.diffusion.random_numbers import generator
from components.files.atomic import atomic_write
from components.version import version
from trainer.config import ConfigError

SETTINGS, GRID, ARCHIVE = "samples.json", "grid.png", "samples.npz"
GRID_IMAGES = 100
FREE = ("num_samples", "batch_size", "source")  # may change when images are added to a folder


class SampleFolder:
    """PNG files ``000000.png``, ... and ``samples.json``, which records the sampling settings.

    Args:
        path: of the folder; :meth:`begin` creates it if missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, i: int) -> Path:
        return self.path / f"{i:06d}.png"

    def settings(self) -> dict[str, Any] | None:
        """Contents of ``samples.json``, or None if there is no such file."""
        try:
            return json.loads((self.path / SETTINGS).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"'{self.path / SETTINGS}' is damaged ({error}); remove the folder") from error

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the settings to ``samples.json``, after a comparison with those already there.

        Raises:
            ConfigError: the settings differ, the folder holds other images, or it cannot be written.
        """
        before = self.settings()
        if before is not None:
            other = [k for k in settings if k not in FREE and before.get(k) != settings[k]]
            if other:
                listed = "".join(f"\n  {k}: {before.get(k)} in the folder, {settings[k]} now" for k in other)
                raise ConfigError(
                    f"'{self.path}' holds samples with other settings:{listed}\nRemove it, or choose another --out"
                )
        elif self.path.is_dir() and any(self.path.glob("*.png")):
            raise ConfigError(f"'{self.path}' holds images but no samples.json; choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            record = settings | {"titanrepa_version": version()}
            with atomic_write(self.path / SETTINGS, fsync=False) as partial:
                partial.write_text(json.dumps(record, indent=1))
        except OSError as error:
            raise ConfigError(f"--out: cannot write to '{self.path}': {error.strerror}") from error

    def missing(self, count: int) -> set[int]:
        """Indices below ``count`` of images that do not exist yet."""
        there = set(os.listdir(self.path))
        return {i for i in range(count) if f"{i:06d}.png" not in there}

    def write(self, i: int, image: Tensor) -> None:
        """Write image i, uint8 (3, R, R) on the CPU, atomically."""
        import PIL.Image

        with atomic_write(self.file(i), fsync=False) as partial:
            PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, "PNG", compress_level=1)

    def read(self, i: int) -> Tensor:
        """Read image i, uint8 (3, R, R)."""
        import PIL.Image

        with PIL.Image.open(self.file(i), formats=["PNG"]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    def write_grid(self, count: int) -> Path:
        """Write a grid of the first images; returns its path."""
        from trainer.run.pictures import grid, save_png

        images = torch.stack([self.read(i) for i in range(min(count, GRID_IMAGES))])
        save_png(grid(to_float(images)), self.path / GRID)
        return self.path / GRID

    def write_archive(self, count: int, resolution: int) -> Path:
        """Write the .npz of the ADM evaluation suite, ``arr_0`` uint8 (count, R, R, 3), one image at a time."""
        path = self.path / ARCHIVE
        with (
            atomic_write(path, fsync=False) as partial,
            zipfile.ZipFile(partial, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, resolution, resolution, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(count):
                file.write(self.read(i).permute(1, 2, 0).contiguous().numpy().tobytes())
        return path


def parse_labels(text: str, num_classes: int) -> list[int] | str:
    """Parse ``balanced``, ``random``, or class indices ``0,207,388``.

    Raises:
        ConfigError: ``text`` is none of these, or a class does not exist.
    """
    if text in ("balanced", "random"):
        return text
    try:
        classes = [int(word) for word in text.split(",")]
    except ValueError:
        classes = []
    if not classes or not all(0 <= c < num_classes for c in classes):
        raise ConfigError(
            f"--labels={text}: expected balanced, random, or class indices from 0 to {num_classes - 1}, e.g. 0,3,7"
        )
    return classes


def labels_of(ids: Sequence[int], kind: list[int] | str, num_classes: int, seed: int) -> list[int]:
    """Class of each image, a function of its index: cycles through all or the listed classes, or is random."""
    if kind == "random":
        return [int(torch.randint(num_classes, (), generator=generator(seed, "label", i))) for i in ids]
    classes = range(num_classes) if kind == "balanced" else kind
    return [classes[i % len(classes)] for i in ids]
