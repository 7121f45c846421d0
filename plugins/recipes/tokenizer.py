"""A tokenizer from scratch: reconstruction and GAN, no diffusion (arXiv 2112.10752)."""

from __future__ import annotations

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import discriminate, reconstruction
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("tokenizer")
class TokenizerOnly:
    """Tokenizer and discriminator alone, for training a VAE from scratch."""

    uses = frozenset({"tokenizer", "reconstruction", "discriminator"})
    trains = {"tokenizer": ("tokenizer",), "discriminator": ("discriminator",)}

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        x = batch.images
        posterior = m.tokenizer.encode(x)
        x_hat = m.tokenizer.decode(posterior.sample(draws.posterior))
        with frozen(m.discriminator):
            update("tokenizer", reconstruction(m, x, x_hat, posterior, step))
        discriminate(m, x, x_hat, step, update)
