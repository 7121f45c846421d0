"""Tokenizer training from scratch with reconstruction and GAN losses, without diffusion (arXiv 2112.10752)."""

from __future__ import annotations

from components.contracts import Batch, Distribution, LatentShape, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import discriminate, reconstruction
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("tokenizer")
class TokenizerOnly(Recipe):
    """Train only tokenizer and discriminator, for example a VAE from scratch."""

    uses = frozenset({"tokenizer", "reconstruction", "discriminator"})
    trains = {"tokenizer": ("tokenizer",), "discriminator": ("discriminator",)}

    def random_numbers(self, m: Modules, latent: LatentShape) -> dict[str, Distribution]:
        return {"posterior": Distribution("normal", latent)}

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        x = batch.images
        posterior = m.tokenizer.encode(x)
        x_hat = m.tokenizer.decode(posterior.sample(random["posterior"]))
        with frozen(m.discriminator):
            update("tokenizer", reconstruction(m, x, x_hat, posterior, step, random))
        discriminate(m, x, x_hat, step, update, random)
