"""Feature network for evaluation that consists of an alignment encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from components.contracts import Encoder
from components.data.pixels import to_float
from components.nn.precision import full_fp32, no_autocast


class EncoderNetwork(nn.Module):
    """Adapts an encoder to :class:`components.evaluation.statistics.FeatureNetwork`: one vector per image.

    The vector is the encoder's own embedding (the class token for vision transformers, as in FD-DINOv2: Stein et al.
    2023, arXiv 2306.04675) or, without one, the mean of its patch tokens.

    Args:
        encoder: with its weights, on its device.
        about: identifies the encoder, including a fingerprint of its weights.
    """

    def __init__(self, encoder: Encoder, about: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.dims = {"embedding": encoder.embed_dim}
        self.about = about | {"vector": "embed" if encoder.own_embedding else "mean of the patch tokens"}
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``embedding`` (B, D), float32, of images uint8 (B, 3, R, R)."""
        with no_autocast(images), full_fp32():
            return {"embedding": self.encoder.embed(to_float(images)).float()}
