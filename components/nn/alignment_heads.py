"""Alignment heads: from the denoiser's hidden tokens to an encoder's features."""

from __future__ import annotations

import math

from torch import Tensor, nn


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


class ConvHead(nn.Module):
    """One 3 x 3 convolution over the grid of tokens (iREPA, arXiv 2512.10794): neighbours stay tied to each other.

    Takes tokens (B, N, width) of a square grid, rows first, to (B, N, embed_dim). State-dict keys are those of the
    published projectors: ``projection_layer.weight`` and ``projection_layer.bias``.

    Args:
        width: features of a hidden token.
        embed_dim: features D_k of the encoder's tokens.
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.projection_layer = nn.Conv2d(width, embed_dim, 3, padding=1)

    def init_weights(self) -> None:
        """PyTorch's own initialisation of a convolution, as published."""
        self.projection_layer.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises ValueError for a number of tokens that is no square, as of a grid and a class token."""
        side = math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ValueError(
                f"the convolutional head takes the tokens of a square grid alone; got {tokens.shape[1]} tokens. Set "
                'head = "mlp" in the alignment loss for a denoiser that has a class token besides'
            )
        planes = tokens.transpose(1, 2).unflatten(2, (side, side))
        return self.projection_layer(planes).flatten(2).transpose(1, 2)
