"""Describe the plugin and cite its source here."""

from __future__ import annotations

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import denoising, drop_labels, frozen_posterior
from components.registry import recipes


@recipes.register("template")
class Template:
    """Train only the denoiser, on a frozen tokenizer. Replace the step and this line, which listings show."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})  # parts to build
    trains = {"denoiser": ("denoiser",)}  # group (one optimizer each) -> parts that it updates
    cached_latents = True  # a step needs no images

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        """Compute the losses and pass them to ``update``; weights change after the step, all or none."""
        t = m.flow.times(draws.time)
        z = frozen_posterior(m, batch).sample(draws.posterior)
        path = m.flow.at(m.latent_norm(z), t, draws.noise)
        update("denoiser", denoising(m, path, t, drop_labels(m, batch.labels, draws.label)))
