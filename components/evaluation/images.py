"""Sets of images to evaluate, from folders, ``.npz`` files and datasets: uint8 (3, H, W), all of one size."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from components.data.images import ImageError, Listing, extensions, printable, read_rgb, silence_decoders
from components.data.loader import check_item
from components.evaluation import EvaluationError


class ImageSet(Protocol):
    """An indexable set of images.

    Attributes:
        name: name in messages and reports.
        identity: changes with the images, as far as file names, sizes and modification times show.
    """

    name: str
    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image uint8 (3, H, W); raises an :class:`EvaluationError` that names the file if it cannot be read."""


class ImageFiles:
    """All image files in a folder and below, sorted by path, without ``grid.png``; see :mod:`components.data.images`.

    Args:
        path: the folder.

    Raises:
        EvaluationError: the folder contains no images, or a folder or file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = printable(path)
        digest = hashlib.sha256()
        try:
            listing = Listing(str(path))
            names = [name for name in listing.all() if os.path.basename(name) != "grid.png"]
            listing.say(self.name)
            self.files = [Path(path, name) for name in names]
            for name, file in zip(names, self.files):
                stat = file.stat()
                digest.update(os.fsencode(name) + f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
        except OSError as error:
            raise _unreadable(error.filename or path, error.strerror or str(error)) from error
        if not self.files:
            raise EvaluationError(f"'{self.name}' contains no images ({' '.join(extensions())})")
        self.identity = f"folder {digest.hexdigest()}"
        silence_decoders()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        try:
            array = np.array(read_rgb(self.files[index]))
        except ImageError as error:
            raise _unreadable(self.files[index], str(error)) from error
        return torch.from_numpy(array).permute(2, 0, 1)


def _unreadable(path: str | Path, reason: str) -> EvaluationError:
    return EvaluationError(f"the image {printable(path)} cannot be read ({reason}); replace or remove it")


class NpzImages:
    """The array ``arr_0`` of an ``.npz`` file: uint8 (N, H, W, 3), the format of ADM's evaluation suite.

    Memory-mapped if stored uncompressed, as by ``np.savez``; otherwise read into memory.

    Args:
        path: the file.

    Raises:
        EvaluationError: the file is damaged or has no such array, or its dtype or shape is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        try:
            self.array = _stored_array(path, "arr_0")
            stat = os.stat(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"'{path}' contains no readable array arr_0 ({error})") from error
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[-1] != 3 or not len(self.array):
            raise EvaluationError(
                f"'{path}': arr_0 is {self.array.dtype} {self.array.shape}, expected uint8 (N, H, W, 3) with N >= 1"
            )
        self.identity = f"npz {stat.st_size} {stat.st_mtime_ns} {self.array.shape}"

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.array[index])).permute(2, 0, 1)


class DatasetImages:
    """Images of a dataset, in its own order, never mirrored.

    Args:
        dataset: see :class:`components.contracts.Dataset`.
        name: name in messages.
        identity: identifies the dataset's options.
        strict: raise for an unreadable file instead of using the image that replaces it.
    """

    def __init__(self, dataset: Any, name: str, identity: str, strict: bool = True) -> None:
        self.dataset, self.name, self.strict = dataset, name, strict
        self.identity = f"dataset {identity} {len(dataset)}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        item = check_item(self.dataset[index], self.dataset, index)
        if self.strict and item.unreadable is not None:
            reason = f" ({item.reason})" if item.reason else ""
            raise EvaluationError(
                f"the image {item.unreadable} of {self.name} cannot be read{reason}; repair or remove it"
            )
        return item.image


class Subset:
    """The first ``count`` images of a set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self.images, self.count = images, min(count, len(images))
        self.name, self.identity = images.name, f"{images.identity} first {self.count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def first_images(images: ImageSet, count: int) -> ImageSet:
    """The first ``count`` images of a set; 0: all."""
    return Subset(images, count) if count else images


def open_images(path: str) -> ImageSet:
    """Open a folder of images or an ``.npz`` file.

    Raises:
        EvaluationError: it is neither, or contains no images.
    """
    there = Path(path).expanduser()
    if there.suffix == ".npz" and there.is_file():
        return NpzImages(there)
    if not there.is_dir():
        what = "does not exist" if not there.exists() else "is neither a folder nor an .npz"
        raise EvaluationError(f"'{path}' {what}; expected a folder of images, or an .npz with arr_0")
    return ImageFiles(there)


def _stored_array(path: str | Path, name: str) -> np.ndarray:
    """Open an array of an ``.npz`` file, memory-mapped if it is not compressed."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as file:
                return file[name]
        # Local zip header: 30 bytes, the last four of which are the lengths of the name and the extra field.
        with open(path, "rb") as file:
            file.seek(entry.header_offset + 26)
            lengths = np.frombuffer(file.read(4), dtype="<u2")
            file.seek(entry.header_offset + 30 + int(lengths.sum()))
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
            if dtype.hasobject:
                raise ValueError("it contains Python objects")
            order = "F" if fortran else "C"
            if file.tell() + dtype.itemsize * int(np.prod(shape)) > os.path.getsize(path):
                raise ValueError("the file is truncated")
            return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)
