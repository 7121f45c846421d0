"""Pixel space: no tokenizer at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.contracts import Posterior
from components.nn.precision import at_least_fp32
from components.registry import tokenizers


@tokenizers.register("identity")
class Identity(nn.Module):
    """Images as they are, for diffusion on pixels: factor 1, three channels, no weights.

    The denoiser's ``patch_size`` decides the number of tokens: 16 at 256 pixels gives the 16 x 16 of the latent models.
    A flow on so many dimensions wants more noise: ``flow.shift = "auto"``.
    """

    factor = 1
    channels = 3
    trainable = False

    def __init__(self) -> None:  # nn.Module's own takes anything
        super().__init__()

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> itself, with the least standard deviation that there is (3e-7)."""
        x = at_least_fp32(x)
        return Posterior(x, torch.full_like(x, -30.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B, 3, R, R) -> itself."""
        return z

    def load_weights(self) -> None:
        """There are none."""

    def units(self) -> Sequence[nn.Module]:
        """None: nothing computes."""
        return []
