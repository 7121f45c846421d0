"""Feature extractors for evaluation: Inception and any alignment encoder."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components.contracts import Encoder
from components.data.pixels import to_float
from components.evaluation.inception import full_fp32
from components.nn.precision import no_autocast

GRID = 16


class Network(Protocol):
    """A feature extractor.

    Attributes:
        dims: number of features by name.
        about: identifies the network in reports, caches and statistics files.
    """

    dims: dict[str, int]
    about: dict[str, Any]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Map images uint8 (B, 3, H, W) to features float (B, D) by name."""


class EncoderNetwork(nn.Module):
    """Adapts an encoder to :class:`Network`: one vector per image.

    The vector is ``encoder.embed(images) -> (B, D)``, for images (B, 3, R, R) in [-1, 1], if the encoder has that
    method (the class token for vision transformers, as in FD-DINOv2: Stein et al. 2023, arXiv 2306.04675); otherwise
    the mean of its patch tokens.

    Args:
        encoder: with its weights, on its device.
        about: identifies the encoder, including a fingerprint of its weights.
    """

    def __init__(self, encoder: Encoder, about: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.dims = {"embedding": encoder.embed_dim}
        self.about = about | {"vector": "embed" if hasattr(encoder, "embed") else "mean of the patch tokens"}
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``embedding`` (B, D), float32, of images uint8 (B, 3, R, R)."""
        with no_autocast(images), full_fp32():
            x = to_float(images)
            embed = getattr(self.encoder, "embed", None)
            return {"embedding": embed(x).float() if embed else self.encoder(x).float().mean(1)}


def native_grid(encoder: type) -> int:
    """Tokens per side for evaluating an encoder: its ``native_grid``, or 16 (224 pixels with patch size 14)."""
    return getattr(encoder, "native_grid", GRID)
