"""Dataset over a latent cache, optionally with the images."""

from __future__ import annotations

from collections.abc import Sequence

from components.contracts import Dataset, DatasetItem, Encoder
from components.data.loader import DataError
from components.latent_cache.cache import LatentCache


class CachedDataset(Dataset):
    """Replaces a dataset by its latent cache: same order, labels and mirroring.

    Args:
        cache: cache of the dataset.
        images: the original dataset if its images are needed too; otherwise None.
        flip: whether training may mirror; requires mirrored copies in the cache.
        features: labels of the encoders whose features to read from the cache.
    """

    def __init__(self, cache: LatentCache, images: Dataset | None, *, flip: bool, features: Sequence[str]) -> None:
        self.cache, self.images, self.flip, self.features = cache, images, flip, tuple(features)
        self.num_classes = cache.num_classes
        self.class_names: Sequence[str] = cache.class_names

    def __len__(self) -> int:
        return len(self.cache)

    def class_counts(self) -> Sequence[int]:
        return self.cache.class_counts()

    def __getitem__(self, index: int) -> DatasetItem:
        return self._sample(index, flipped=False)

    def mirrored(self, index: int) -> DatasetItem:
        """The sample of the image mirrored left-right."""
        return self._sample(index, flipped=True)

    def _sample(self, index: int, flipped: bool) -> DatasetItem:
        cached, label = self.cache.read(index, flipped, self.features)
        if self.images is None:
            return DatasetItem(None, label, None, cached)
        sample = self.images[index]
        # An unreadable file was replaced by another image, perhaps of another class.
        if sample.label != label and sample.unreadable is None and index not in self.cache.replaced:
            raise DataError(
                f"latent cache {self.cache.path}: image {index} has label {label} in the cache and {sample.label} in "
                "the dataset, so they do not match. Encode the dataset again, or set latent_cache.path = ''"
            )
        image = sample.image.flip(-1) if flipped else sample.image
        return sample._replace(image=image, label=label, cached=cached)


class CachedEncoder(Encoder):
    """Placeholder for an encoder whose features are cached: it has no weights and is never called."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
