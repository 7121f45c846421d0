"""Describe the plugin and cite its source here."""

from __future__ import annotations

import torch

from components.contracts import Dataset, DatasetItem
from components.registry import datasets


@datasets.register("template")
class Template(Dataset):
    """Color gradients in two directions. Replace the dataset and this line, which listings show.

    Args:
        size: number of images.
    """

    class_names = ("left to right", "top to bottom")
    num_classes = 2

    def __init__(self, resolution: int, *, size: int = 1000) -> None:
        if size < 1:
            raise ValueError(f"dataset.size = {size}: expected at least 1 image")
        self.resolution = resolution
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the image (uint8, (3, R, R)) and its class, a function of the index only."""
        if not 0 <= index < self.size:
            raise IndexError(f"dataset template: index {index} is outside its {self.size} images")
        colors = torch.rand(2, 3, generator=torch.Generator().manual_seed(index))
        ramp = torch.linspace(0, 1, self.resolution)
        line = colors[0, :, None] * (1 - ramp) + colors[1, :, None] * ramp  # (3, R)
        image = (line[:, None] * 255).round().to(torch.uint8).expand(3, self.resolution, self.resolution)
        label = index % 2
        return DatasetItem((image if label == 0 else image.mT).contiguous(), label)
