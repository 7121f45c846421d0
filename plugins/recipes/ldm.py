"""Latent diffusion without alignment (SiT, arXiv 2401.08740), the baseline."""

from __future__ import annotations

from components.contracts import Batch, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import denoising, drop_condition, frozen_posterior
from components.registry import recipes


@recipes.register("ldm")
class Ldm(Recipe):
    """Train only the denoiser, by velocity matching on the latents of a frozen tokenizer (SiT)."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})
    trains = {"denoiser": ("denoiser",)}
    cached_latents = True

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        t = m.flow.times(random["time"])
        z = frozen_posterior(m, batch).sample(random["posterior"])
        path = m.flow.sample(m.latent_norm(z), t, random["noise"])
        update("denoiser", denoising(m, path, t, drop_condition(m, batch.condition, random["label"])))
