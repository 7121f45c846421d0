"""Describe the plugin and cite its source here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Encoder
from components.files.weights import load_strict, read_state
from components.registry import File, encoders

PATCH = 8  # pixels per token side


@encoders.register("template")
class Template(Encoder):
    """Single-layer patch encoder. Replace the network and this line, which listings show.

    For a timm model, derive from components.nn.timm_encoder.TimmEncoder instead.

    Args:
        width: features per token.
        checkpoint: weights file; none: random weights.
    """

    def __init__(self, resolution: int, grid: int, *, width: int = 64, checkpoint: File | None = None) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"encoders.template: width = {width}; expected at least 1")
        self.grid = grid
        self.embed_dim = width
        self.checkpoint = checkpoint
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)
        self.requires_grad_(False).eval()

    def load_weights(self) -> None:
        """Load ``checkpoint``, if set. Raises WeightsError if the file is missing or does not fit."""
        if self.checkpoint:
            what = "encoder template"
            load_strict(self, read_state(self.checkpoint, what), what, self.checkpoint)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, grid * grid, width) patch tokens in row-major order."""
        side = PATCH * self.grid
        x = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return self.norm(self.patches(x).flatten(2).transpose(1, 2))
