"""Alignment heads: from the denoiser's hidden tokens to an encoder's features."""

from __future__ import annotations

from torch import nn


class MLPHead(nn.Sequential):
    """Three linear layers with SiLU between them (REPA, arXiv 2410.06940).

    Takes tokens (B, N, width) to (B, N, embed_dim). State-dict keys are those of the published projectors:
    ``0``, ``2`` and ``4``, ``weight`` and ``bias`` each.

    Args:
        width: features of a hidden token.
        hidden: features of the two inner layers.
        embed_dim: features D_k of the encoder's tokens.
    """

    def __init__(self, width: int, hidden: int, embed_dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, embed_dim),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
