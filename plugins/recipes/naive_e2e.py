"""Naive end-to-end training, which fails: the tokenizer also minimizes the diffusion loss (REPA-E, section 3)."""

from __future__ import annotations

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import denoising, discriminate, drop_labels, reconstruction
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("naive_e2e")
class NaiveEndToEnd:
    """Train the tokenizer with the diffusion loss, to reproduce its failure: latents become trivial to denoise."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm", "reconstruction", "discriminator"})
    trains = {
        "tokenizer": ("tokenizer",),
        "discriminator": ("discriminator",),
        "denoiser": ("denoiser",),
    }

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        x, labels = batch.images, batch.labels
        t = m.flow.times(draws.time)
        labels = drop_labels(m, labels, draws.label)

        posterior = m.tokenizer.encode(x)
        z = posterior.sample(draws.posterior)
        x_hat = m.tokenizer.decode(z)
        with frozen(m.denoiser, m.discriminator):
            path = m.flow.at(m.latent_norm.batch(z, update=False), t, draws.noise)
            terms = reconstruction(m, x, x_hat, posterior, step)
            update("tokenizer", terms | denoising(m, path, t, labels))

        discriminate(m, x, x_hat, step, update)

        path = m.flow.at(m.latent_norm.batch(z.detach()), t, draws.noise)
        update("denoiser", denoising(m, path, t, labels))
