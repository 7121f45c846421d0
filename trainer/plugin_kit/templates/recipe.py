"""Describe the plugin and cite its source here."""

from __future__ import annotations

from components.contracts import Batch, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import denoising, drop_condition, frozen_posterior
from components.registry import recipes


@recipes.register("template")
class Template(Recipe):
    """Train only the denoiser, on a frozen tokenizer. Replace the step and this line, which listings show."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})  # parts to build
    trains = {"denoiser": ("denoiser",)}  # group (one optimizer each) -> parts that it updates
    cached_latents = True  # a step needs no images

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        """Compute the losses and pass them to ``update``; weights change after the step, all or none."""
        t = m.flow.times(random["time"])
        z = frozen_posterior(m, batch).sample(random["posterior"])
        path = m.flow.sample(m.latent_norm(z), t, random["noise"])
        update("denoiser", denoising(m, path, t, drop_condition(m, batch.condition, random["label"])))
