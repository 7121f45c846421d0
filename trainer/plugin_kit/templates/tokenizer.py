"""Describe the plugin and cite its source here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from components.contracts import Posterior, Tokenizer
from components.files.weights import load_strict, read_state
from components.nn.precision import at_least_fp32
from components.registry import File, tokenizers


@tokenizers.register("template")
class Template(Tokenizer):
    """Convolutional autoencoder with factor 4. Replace the network and this line, which listings show.

    Args:
        latent_channels: latent channels C.
        width: channels of the hidden layers.
        checkpoint: file of initial weights; none: random weights.
        trainable: false freezes the tokenizer; recipes that train it then raise an error.
    """

    factor = 4

    def __init__(
        self, *, latent_channels: int = 4, width: int = 32, checkpoint: File | None = None, trainable: bool = True
    ) -> None:
        super().__init__()
        if min(latent_channels, width) < 1:
            raise ValueError(
                f"tokenizer.latent_channels = {latent_channels}, tokenizer.width = {width}: expected at least 1"
            )
        self.channels = latent_channels
        self.checkpoint = checkpoint
        self.trainable = trainable
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * latent_channels, 4, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent_channels, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )
        self.requires_grad_(trainable)

    def init_weights(self) -> None:
        """Fill every parameter and buffer: training constructs the module on the meta device first."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.reset_parameters()

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> posterior over (B, C, R / 4, R / 4)."""
        mean, logvar = at_least_fp32(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, 4 h, 4 w), nominally in [-1, 1]."""
        return self.decoder(z)

    def load_weights(self) -> None:
        """Load ``checkpoint``, if set. Raises WeightsError if the file is missing or does not fit."""
        if self.checkpoint:
            what = "tokenizer template"
            load_strict(self, read_state(self.checkpoint, what), what, self.checkpoint)

    def units(self) -> Sequence[nn.Module]:
        """Return the sub-modules to compile, checkpoint and shard one by one; use each only through its forward."""
        return [self.encoder, self.decoder]
