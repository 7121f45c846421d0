"""Colors as an alignment target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from components.contracts import Encoder
from components.registry import encoders


@encoders.register("mean_colors")
class MeanColors(Encoder):
    """Mean colors of the parts of each patch: an encoder without training.

    Args:
        parts: number of parts along each side of a patch.
    """

    def __init__(self, resolution: int, grid: int, *, parts: int = 2) -> None:
        super().__init__()
        if parts < 1:
            raise ValueError(f"encoders.mean_colors: parts = {parts}; expected at least 1")
        self.grid, self.parts = grid, parts
        self.embed_dim = 3 * parts**2

    def load_weights(self) -> None:
        """Do nothing: the encoder has no weights."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, grid * grid, 3 * parts * parts), row-major."""
        means = F.adaptive_avg_pool2d(images, self.grid * self.parts)
        return F.pixel_unshuffle(means, self.parts).flatten(2).transpose(1, 2)
