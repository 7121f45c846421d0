"""Latent diffusion without alignment (SiT, arXiv 2401.08740), the baseline."""

from __future__ import annotations

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import denoising, drop_labels, frozen_posterior
from components.registry import recipes


@recipes.register("ldm")
class Ldm:
    """Train only the denoiser, by velocity matching on the latents of a frozen tokenizer (SiT)."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})
    trains = {"denoiser": ("denoiser",)}
    cached_latents = True

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        t = m.flow.times(draws.time)
        z = frozen_posterior(m, batch).sample(draws.posterior)
        path = m.flow.at(m.latent_norm(z), t, draws.noise)
        update("denoiser", denoising(m, path, t, drop_labels(m, batch.labels, draws.label)))
