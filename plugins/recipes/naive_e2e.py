"""Naive end-to-end training, which fails: the tokenizer also minimizes the diffusion loss (REPA-E, section 3)."""

from __future__ import annotations

from components.contracts import Batch, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import denoising, discriminate, drop_condition, reconstruction
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("naive_e2e")
class NaiveEndToEnd(Recipe):
    """Train the tokenizer with the diffusion loss, to reproduce its failure: latents become trivial to denoise."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm", "reconstruction", "discriminator"})
    trains = {
        "tokenizer": ("tokenizer",),
        "discriminator": ("discriminator",),
        "denoiser": ("denoiser",),
    }

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        x = batch.images
        t = m.flow.times(random["time"])
        condition = drop_condition(m, batch.condition, random["label"])

        posterior = m.tokenizer.encode(x)
        z = posterior.sample(random["posterior"])
        x_hat = m.tokenizer.decode(z)
        with frozen(m.denoiser, m.discriminator):
            path = m.flow.sample(m.latent_norm.batch(z, update=False), t, random["noise"])
            terms = reconstruction(m, x, x_hat, posterior, step, random)
            update("tokenizer", terms | denoising(m, path, t, condition))

        discriminate(m, x, x_hat, step, update, random)

        path = m.flow.sample(m.latent_norm.batch(z.detach()), t, random["noise"])
        update("denoiser", denoising(m, path, t, condition))
