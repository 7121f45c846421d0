"""Alignment heads: project the denoiser's hidden tokens to an encoder's features."""

from __future__ import annotations

import math

from torch import Tensor, nn

from components.contracts import Network


class MLPHead(nn.Sequential, Network):
    """MLP of three linear layers with SiLU (REPA, arXiv 2410.06940).

    Maps tokens (B, N, width) to (B, N, embed_dim). State-dict keys match the published projectors: ``weight`` and
    ``bias`` of ``0``, ``2`` and ``4``.

    Args:
        width: width of the denoiser's hidden tokens.
        hidden: width of the hidden layers.
        embed_dim: embedding dimension D_k of the encoder.
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


class ConvHead(Network):
    """3 x 3 convolution over the token grid (iREPA, arXiv 2512.10794), which preserves spatial structure.

    Maps tokens (B, N, width) of a square grid in row-major order to (B, N, embed_dim). State-dict keys match the
    published projectors: ``projection_layer.weight`` and ``projection_layer.bias``.

    Args:
        width: width of the denoiser's hidden tokens.
        embed_dim: embedding dimension D_k of the encoder.
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.projection_layer = nn.Conv2d(width, embed_dim, 3, padding=1)

    def init_weights(self) -> None:
        """PyTorch's default initialization of a convolution, as published."""
        self.projection_layer.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens; raise ValueError if N is not a square, for example because of a class token."""
        side = math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ValueError(
                f"the convolutional head needs the tokens of a square grid; got {tokens.shape[1]} tokens. Set "
                'head = "mlp" in the alignment loss for a denoiser with a class token'
            )
        planes = tokens.transpose(1, 2).unflatten(2, (side, side))
        return self.projection_layer(planes).flatten(2).transpose(1, 2)
