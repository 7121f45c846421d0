"""Networks whose features images are compared on: Inception, and any alignment encoder."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components.contracts import Encoder
from components.evaluation.inception import full_fp32
from components.nn.precision import no_autocast

GRID = 16


class Network(Protocol):
    """Images to features.

    Attributes:
        dims: features by name.
        about: which network it is; goes into reports, and tells caches and statistics of other networks apart.
    """

    dims: dict[str, int]
    about: dict[str, Any]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> float (B, D) by name."""


class EncoderNetwork(nn.Module):
    """An encoder as a network for the Frechet distance: one vector per image.

    An encoder that offers ``embed(images) -> (B, D)``, for images (B, 3, R, R) in [-1, 1], says itself which vector
    that is (the class token of vision transformers, on which FD-DINOv2 is defined: Stein et al. 2023, arXiv
    2306.04675); of any other it is the mean of its patch tokens.

    Args:
        encoder: with its weights, in its place.
        about: which one, with a fingerprint of its weights.
    """

    def __init__(self, encoder: Encoder, about: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.dims = {"embedding": encoder.embed_dim}
        self.about = about | {"vector": "embed" if hasattr(encoder, "embed") else "mean of the patch tokens"}
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``embedding`` (B, D), float32, of uint8 (B, 3, R, R)."""
        with no_autocast(images), full_fp32():
            x = images.float() / 127.5 - 1
            embed = getattr(self.encoder, "embed", None)
            return {"embedding": embed(x).float() if embed else self.encoder(x).float().mean(1)}


def native_grid(encoder: type) -> int:
    """Tokens per side with which an encoder is compared: its ``native_grid``, or 16 (224 pixels of patches of 14)."""
    return getattr(encoder, "native_grid", GRID)
