"""Image-folder dataset with one sub-folder per class, such as ImageNet."""

from __future__ import annotations

import collections
import os
from typing import Literal

import numpy as np

from components import registry
from components.data.image_dataset import ImageDataset
from components.data.images import Listing, extensions, printable
from components.data.loader import DataError

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})

HELP = """\
Set [dataset] path to a folder with one sub-folder per class; for ImageNet, PATH/n01440764/*.JPEG to
PATH/n15075141/*.JPEG (1000 folders). ImageNet is free for research after registration: download the ILSVRC2012
training images (task 1 and 2) from https://image-net.org/download-images and extract each class's .tar into a folder
of the same name, or use the dataset ILSVRC/imagenet-1k on Hugging Face."""


@registry.datasets.register("image_folder")
class ImageFolder(ImageDataset):
    """Center-cropped image files in one sub-folder per class (ImageNet layout).

    Classes are the sub-folders, sorted as text ("10" before "2"); files may be nested inside them. A class without
    images keeps its label, but is left out of samples. Files are listed by :mod:`components.data.images`. For pixels,
    crop and unreadable files see :class:`components.data.image_dataset.ImageDataset`.

    Args:
        path: folder with one sub-folder per class.
        flip: allow horizontal flips in training.
        decoder: "exact": Pillow, ADM's crop to 1 of 255 levels; "fast": torchvision for JPEGs and PyTorch's filters,
            1.6 times as many images/s at 256 px, to 3 levels.

    Raises:
        DataError: the folder is missing or contains no class folders or no images, or torchvision, which the fast
            decoder needs, cannot decode JPEGs.
    """

    title = "dataset image_folder"

    def __init__(
        self, resolution: int, *, path: registry.File, flip: bool = True, decoder: Literal["exact", "fast"] = "exact"
    ) -> None:
        super().__init__(resolution, os.path.abspath(os.path.expanduser(path)), flip, decoder)
        listing = _open(path, self.path)
        self.class_names = [printable(folder) for folder in listing.folders]
        self.num_classes = len(self.class_names)
        # One bytes object and two arrays: a list of a million strings would be copied into every worker, because
        # updating reference counts triggers copy-on-write.
        names: list[bytes] = []
        lengths: list[int] = []
        counts: list[int] = []
        for folder in listing.folders:
            found = [os.fsencode(name) for name in sorted(_below(listing, folder))]
            names.append(b"".join(found))
            lengths += map(len, found)
            counts.append(len(found))
        self._names = b"".join(names)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._labels = np.repeat(np.arange(self.num_classes, dtype=np.int32), counts)
        if not len(self):
            raise DataError(
                f"dataset image_folder: '{path}' has {self.num_classes} sub-folders ({', '.join(self.class_names[:3])}"
                f"{', ...' if self.num_classes > 3 else ''}) but no images ({' '.join(extensions())})"
                f"{_contents(self.path)}.\n{HELP}"
            )
        if listing.files:
            listing.left_out["images beside the class folders"] = len(listing.files)
        listing.say(f"dataset image_folder: {printable(path)}")

    def file(self, index: int) -> str:
        """Return the path of image ``index`` in [0, len)."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.path, os.fsdecode(self._names[start : self._ends[index]]))

    encoded = place = file


def _open(path: str, root: str) -> Listing:
    """Open the folder of the class folders; messages show ``path`` as the user wrote it."""
    if not path or not os.path.isdir(root):
        raise DataError(f"dataset image_folder: '{path}' is not a folder (looked at {root}).\n{HELP}")
    try:
        listing = Listing(root)
        folders = listing.folders
        splits = folders if SPLITS.issuperset(name.lower() for name in folders) else []
        inner = [name for name in splits if Listing(os.path.join(root, name)).folders]
    except OSError as error:
        raise _unlisted(error) from error
    if not folders and listing.files:
        raise DataError(
            f"dataset image_folder: '{path}' has no sub-folders, one per class{_contents(root)}. For one class, put "
            f"them into one sub-folder, such as '{os.path.join(path, 'all')}', and keep [dataset] path = '{path}'"
        )
    if not folders:
        raise DataError(f"dataset image_folder: '{path}' has no sub-folders, one per class{_contents(root)}.\n{HELP}")
    if inner:
        best = min(inner, key=lambda name: (not name.lower().startswith("train"), name))
        raise DataError(
            f"dataset image_folder: the sub-folders of '{path}' ({', '.join(folders)}) are splits, not classes; "
            f"set [dataset] path to '{os.path.join(path, best)}'"
        )
    return listing


def _below(listing: Listing, folder: str) -> list[str]:
    try:
        return listing.below(folder)
    except OSError as error:
        raise _unlisted(error) from error


def _unlisted(error: OSError) -> DataError:
    where = printable(error.filename or "a folder")
    return DataError(
        f"dataset image_folder: {where} cannot be listed ({error.strerror}); make it readable, or move it away"
    )


def _contents(root: str) -> str:
    """Describe what a folder contains, as in '; it holds 1000 .tar, 3 .txt'; '' for no files."""
    kinds = collections.Counter(
        os.path.splitext(name)[1].lower() or "files without extension"
        for _, _, files in os.walk(root)
        for name in files
    )
    return "; it holds " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) if kinds else ""
