"""Folder of samples that supports interruption and resumption, and that common evaluation scripts can read."""

from __future__ import annotations

import bisect
import difflib
import itertools
import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.data.classes import Classes
from components.data.pixels import to_float
from components.diffusion.random_numbers import generator
from components.files.atomic import atomic_write
from components.version import version
from trainer.config import ConfigError

SETTINGS, GRID, ARCHIVE = "samples.json", "grid.png", "samples.npz"
GRID_IMAGES = 100
FREE = ("num_samples", "batch_size", "source", "classes")  # may change when images are added to a folder
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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
            ConfigError: the settings or classes differ, or the folder holds other images than those asked for, or it
                cannot be written.
        """
        before = self.settings()
        if before is not None:
            changed = self.classes().difference(_classes(settings))
            if changed:
                raise ConfigError(
                    f"'{self.path}' holds samples of a model with other classes (folder -> now): {changed}. Remove it, "
                    "or choose another --out"
                )
            other = [k for k in settings if k not in FREE and before.get(k) != settings[k]]
            if other:
                listed = "".join(f"\n  {k}: {before.get(k)} in the folder, {settings[k]} now" for k in other)
                raise ConfigError(
                    f"'{self.path}' holds samples with other settings:{listed}\nRemove it, or choose another --out"
                )
        self._check_images(settings.get("num_samples", 0), known=before is not None)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            record = settings | {"titanrepa_version": version()}
            with atomic_write(self.path / SETTINGS, fsync=False) as partial:
                partial.write_text(json.dumps(record, indent=1))
        except OSError as error:
            raise ConfigError(f"--out: cannot write to '{self.path}': {error.strerror}") from error

    def classes(self) -> Classes:
        """Classes that the folder's labels stand for; empty if unknown."""
        return _classes(self.settings() or {})

    def _check_images(self, count: int, known: bool) -> None:
        """Raise ConfigError if the folder holds images that are not among its ``count`` samples."""
        wanted = {f"{i:06d}.png" for i in range(count)} if known else set()
        others = sorted(set(self.images()) - wanted - ({GRID} if known else set()))
        if not others:
            return
        if not known:
            raise ConfigError(f"'{self.path}' holds images but no samples.json; choose another --out")
        numbers = [int(name[:6]) for name in others if re.fullmatch(r"\d{6,}\.png", name)]
        if len(numbers) == len(others):
            raise ConfigError(
                f"'{self.path}' holds {len(others)} samples beyond the {count} asked for, which evaluate would count; "
                f"ask for --num-samples={max(numbers) + 1}, remove them, or choose another --out"
            )
        raise ConfigError(
            f"'{self.path}' holds {len(others)} images that are not its samples ({', '.join(others[:3])}), which "
            "evaluate would count; remove them, or choose another --out"
        )

    def images(self) -> list[str]:
        """Image files in the folder, recursively, relative to it; without hidden ones."""
        found = []
        for folder, inner, names in os.walk(self.path):
            inner[:] = [name for name in inner if not name.startswith(".")]
            found += [Path(folder, n) for n in names if n.lower().endswith(IMAGES) and not n.startswith(".")]
        return [str(path.relative_to(self.path)) for path in found]

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


def _classes(settings: dict[str, Any]) -> Classes:
    """Classes of the ``classes`` field, {index: name}, of ``samples.json``."""
    found = settings.get("classes")
    return Classes(tuple(map(str, found.values()))) if isinstance(found, dict) else Classes()


def parse_labels(text: str, num_classes: int, classes: Classes) -> list[int] | str:
    """Parse ``balanced``, ``random``, ``dataset``, or classes separated by commas: indices or names, ``0,cat,388``.

    ``index:2`` and ``name:2`` say which is meant where names are numbers.

    Raises:
        ConfigError: ``text`` is none of these, or a class does not exist; lists index and name of the classes.
    """
    if text in ("balanced", "random", "dataset"):
        return text
    return [_label(text, word.strip(), num_classes, classes) for word in text.split(",")]


def _label(text: str, word: str, num_classes: int, classes: Classes) -> int:
    kind, colon, rest = word.partition(":")
    named = not (colon and kind == "index")
    indexed = not (colon and kind == "name")
    word = rest if colon and kind in ("index", "name") else word
    by_name = classes.names.index(word) if named and word in classes.names else None
    by_index = int(word) if indexed and word.isascii() and word.isdecimal() and int(word) < num_classes else None
    if by_name is not None and by_index is not None and by_name != by_index:
        raise ConfigError(
            f"--labels={text}: '{word}' is ambiguous: index {classes.shown(by_index)}, but the class named '{word}' "
            f"has index {by_name}; write index:{word} or name:{word}"
        )
    if by_name is None and by_index is None:
        close = difflib.get_close_matches(word, classes.names, n=1) if named else []
        near = f"; did you mean '{close[0]}'?" if close else ""
        listed = f". Classes: {classes.listing()}" if classes.names else ""
        raise ConfigError(
            f"--labels={text}: no class '{word}'; expected balanced, random, dataset, or class indices from 0 to "
            f"{num_classes - 1} or names, separated by commas{near}{listed}"
        )
    return by_name if by_index is None else by_index


def labels_of(
    ids: Sequence[int], kind: list[int] | str, labels: Sequence[int], seed: int, counts: Sequence[int] = ()
) -> list[int]:
    """Class of each image, a function of its index.

    Args:
        ids: indices of the images.
        kind: "balanced" cycles through ``labels``, a list through its classes; "random" draws from ``labels``
            uniformly, "dataset" from all classes in proportion to ``counts``.
        labels: classes that have images.
        seed: of the random labels.
        counts: images per class.
    """
    if kind == "dataset":
        ends = list(itertools.accumulate(counts))
        drawn = [int(torch.randint(ends[-1], (), generator=generator(seed, "label", i))) for i in ids]
        return [bisect.bisect_right(ends, number) for number in drawn]
    if kind == "random":
        return [labels[int(torch.randint(len(labels), (), generator=generator(seed, "label", i)))] for i in ids]
    cycle = labels if kind == "balanced" else kind
    return [cycle[i % len(cycle)] for i in ids]
