"""Base class of datasets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from components.contracts.records import DatasetItem


class Dataset:
    """Map-style dataset of images with class labels. Constructed from ``(resolution: int)`` and options.

    Attributes:
        num_classes: number of classes; labels are in [0, num_classes).
        class_names: one name per class.
        flip: whether random horizontal flips are allowed in training.
        given: names of the constructor arguments that the trainer passes; options follow after a bare ``*``.
        has_judge: whether :meth:`judge` is available.
        judge_dim: number of features of :meth:`judge_features`; 0: not available.
        suffixes: extensions of the files that tell that this dataset reads a folder: ``python -m trainer pack FOLDER``.
        conditions: names in ``DatasetItem.condition``, if the denoiser is conditioned on more than the class.
    """

    given: ClassVar[tuple[str, ...]] = ("resolution",)
    has_judge: bool = False
    judge_dim: ClassVar[int] = 0
    suffixes: ClassVar[tuple[str, ...]] = ()
    conditions: ClassVar[tuple[str, ...]] = ()

    num_classes: int
    class_names: Sequence[str]
    flip: bool = False

    @abstractmethod
    def __len__(self) -> int:
        raise NotImplementedError

    @abstractmethod
    def __getitem__(self, index: int) -> DatasetItem:
        raise NotImplementedError

    def class_counts(self) -> Sequence[int] | None:
        """Images per class, if known without reading items; otherwise None. Recorded with the run."""
        return None

    def mirrored(self, index: int) -> DatasetItem:
        """The item of the image mirrored left-right. A dataset that stores mirrored copies (a cache) overrides it."""
        item = self[index]
        if not isinstance(item, DatasetItem) or not isinstance(item.image, Tensor):
            return item  # without an image, or refused by the caller
        return item._replace(image=item.image.flip(-1))

    def judge(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> the class (B,) that each shows, to measure how well samples fit labels."""
        raise NotImplementedError

    def judge_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> features (B, judge_dim) of a network that no run trains or aligns with."""
        raise NotImplementedError

    def judge_identity(self) -> str:
        """Text that changes with the judge's weights, such as a fingerprint; required with ``judge_dim``."""
        raise NotImplementedError

    def sampling_conditions(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Conditions (B, ...) of the samples with these numbers, by name; a function of the numbers alone."""
        return {}
