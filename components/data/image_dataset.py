"""Base class of datasets of encoded images: decoding, ADM's center crop, labels, replacement of unreadable images."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from components.contracts import Dataset, DatasetItem
from components.data.crop import crop_image, crop_tensor, to_tensor
from components.data.images import ImageError, check_fast_decoder, printable, read_rgb, read_rgb_fast, silence_decoders
from components.data.loader import DataError

PATIENCE = 100
"""Number of consecutive unreadable images after which reading stops: the dataset, not an image, is then the problem."""


class ImageDataset(Dataset):
    """Center-cropped images that are stored encoded, each with a class.

    Images are converted to 8-bit RGB by :mod:`components.data.images`, as in evaluation. The crop is ADM's (arXiv
    2105.05233), see :mod:`components.data.crop`. An unreadable image is replaced by the next readable one; the item's
    fields ``unreadable`` and ``reason`` say which and why.

    A subclass calls this constructor, then sets ``class_names``, ``num_classes`` and ``_labels``, or calls
    :meth:`_set_labels`.

    Args:
        resolution: side R of the items' images.
        path: of the dataset, for messages.
        flip: allow horizontal flips in training.
        decoder: "exact": Pillow; "fast": torchvision for JPEGs and PyTorch's filters.

    Attributes:
        title: of the plugin in messages.

    Raises:
        DataError: torchvision, which the fast decoder needs, cannot decode JPEGs.
    """

    title: ClassVar[str] = "dataset"
    _labels: np.ndarray

    def __init__(self, resolution: int, path: str, flip: bool, decoder: Literal["exact", "fast"]) -> None:
        silence_decoders()
        if decoder == "fast":
            try:
                check_fast_decoder()
            except ImageError as error:
                raise DataError(f'{self.title}: decoder = "fast": {error}; set decoder = "exact"') from error
        self.resolution, self.path, self.flip, self.decoder = resolution, path, flip, decoder

    @abstractmethod
    def encoded(self, index: int) -> str | bytes:
        """The file, or the content of the file, of image ``index`` in [0, len); raises if it cannot be read."""
        raise NotImplementedError

    @abstractmethod
    def place(self, index: int) -> str:
        """Where image ``index`` in [0, len) is stored, for messages; does not raise."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """The class of image ``index`` in [0, len)."""
        return int(self._labels[index])

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        silence_decoders()

    def __len__(self) -> int:
        return len(self._labels)

    def class_counts(self) -> list[int]:
        return np.bincount(self._labels, minlength=self.num_classes).tolist()

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the image (uint8, (3, R, R)), its class and, if another image replaced it, the place of ``index``.

        Raises:
            IndexError: ``index`` is outside [0, len).
            DataError: none of the 100 images from ``index`` on can be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.title}: index {index} is outside its {len(self)} images")
        unreadable, why = None, ""
        for other in range(index, index + min(PATIENCE, len(self))):
            other %= len(self)
            try:
                image = self._read(other)
            except Exception as error:  # one image must not end a run
                unreadable, why = unreadable or printable(self.place(index)), why or str(error)
                reason = f"{printable(self.place(other))}: {error}"
                continue
            return DatasetItem(image, self.label(other), unreadable, reason=why)
        raise DataError(
            f"{self.title}: {min(PATIENCE, len(self))} images in a row cannot be read, starting with {unreadable}; "
            f"the last: {reason}. Check that {self.path} still exists and is readable."
        )

    def _set_labels(self, labels: Sequence[str], codes: np.ndarray, names: Sequence[str] | None, where: str) -> None:
        """Set the classes from labels as text: indices of classes if all are numbers, else names of classes.

        Args:
            labels: distinct labels.
            codes: number in ``labels`` of each image's label.
            names: of the classes; None: the numbers up to the largest, or the labels, sorted.
            where: what names the classes, for messages.

        Raises:
            DataError: a label is no class.
        """
        numbers = all(re.fullmatch(r"[+-]?[0-9]{1,9}", label) for label in labels)
        if names is None:
            last = max(map(int, labels)) if numbers else 0
            names = [str(number) for number in range(last + 1)] if numbers else sorted(labels)
        places = {name: number for number, name in enumerate(names)}
        table = [int(label) if numbers else places.get(label, -1) for label in labels]
        if wrong := [label for label, place in zip(labels, table) if not 0 <= place < len(names)]:
            shown = ", ".join(f"'{label}'" for label in wrong[:3])
            raise DataError(
                f"{where}: {len(wrong)} of {len(labels)} labels are none of its {len(names)} classes: {shown}; "
                "expected their indices from 0, or their names"
            )
        self.class_names, self.num_classes = list(names), len(names)
        self._labels = np.array(table, np.int32)[codes]

    def _read(self, index: int) -> Tensor:
        """Read and crop an image: uint8 (3, R, R), channels last in memory; raises :class:`ImageError`."""
        source = self.encoded(index)
        image = read_rgb_fast(source) if self.decoder == "fast" else read_rgb(source)
        if isinstance(image, Tensor):
            return crop_tensor(image, self.resolution)
        return to_tensor(crop_image(image, self.resolution))
