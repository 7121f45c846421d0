"""Identity tokenizer, for diffusion in pixel space."""

from __future__ import annotations

import torch
from torch import Tensor

from components.contracts import Posterior, Tokenizer
from components.nn.precision import at_least_fp32
from components.registry import tokenizers


@tokenizers.register("identity")
class Identity(Tokenizer):
    """Identity, for diffusion in pixel space: factor 1, three channels, no weights.

    The denoiser's ``patch_size`` sets the number of tokens: 16 at 256 pixels yields 16 x 16 tokens, as in the latent
    models. The high dimension needs more noise: set ``flow.shift = "auto"``.
    """

    factor = 1
    channels = 3
    trainable = False

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> posterior with the image as mean and the minimum standard deviation (3e-7)."""
        x = at_least_fp32(x)
        return Posterior(x, torch.full_like(x, -30.0))

    def decode(self, z: Tensor) -> Tensor:
        """Return ``z`` (B, 3, R, R) unchanged."""
        return z
