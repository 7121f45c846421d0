"""A latent cache as a dataset, with the images beside it where something still needs them."""

from __future__ import annotations

from collections.abc import Sequence

from components.contracts import Dataset, Sample
from components.data.loader import DataError
from components.latent_cache.cache import LatentCache


class CachedDataset:
    """Samples of a cache in the place of a dataset: the same order, labels and mirroring.

    Args:
        cache: of the same images.
        images: the dataset itself, whose images are read besides; none: nothing needs them.
        flip: whether training may mirror; then the cache holds mirrored copies.
        features: labels of the encoders whose features are taken from the cache.
    """

    def __init__(self, cache: LatentCache, images: Dataset | None, *, flip: bool, features: Sequence[str]) -> None:
        self.cache, self.images, self.flip, self.features = cache, images, flip, tuple(features)
        self.num_classes = cache.num_classes
        self.class_names: Sequence[str] = cache.index["class_names"]

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, flipped=False)

    def mirrored(self, index: int) -> Sample:
        """The sample of the image mirrored left-right."""
        return self._sample(index, flipped=True)

    def _sample(self, index: int, flipped: bool) -> Sample:
        cached, label = self.cache.read(index, flipped, self.features)
        if self.images is None:
            return Sample(None, label, None, cached)
        sample = Sample(*self.images[index])
        # Where a file has become unreadable, another image, of perhaps another class, stands in its place.
        if sample.label != label and sample.unreadable is None and index not in self.cache.replaced:
            raise DataError(
                f"latent cache {self.cache.path}: image {index} has label {label} there and {sample.label} in the "
                "dataset; they are not of the same images. Encode the dataset anew, or set latent_cache.path = ''"
            )
        return Sample(sample.image.flip(-1) if flipped else sample.image, label, sample.unreadable, cached)


class CachedEncoder:
    """Stands for an encoder whose features are cached: it has no weights, and nobody calls it."""

    def __init__(self, embed_dim: int) -> None:
        self.embed_dim = embed_dim
