"""REPA (arXiv 2410.06940): latent diffusion aligned with a visual encoder."""

from __future__ import annotations

from components.contracts import Batch, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import denoising, drop_condition, encode_targets, frozen_posterior
from components.registry import recipes


@recipes.register("repa")
class Repa(Recipe):
    """Train denoiser and alignment heads on a frozen tokenizer (REPA); also second stage of REPA-E's best result."""

    uses = frozenset({"tokenizer", "denoiser", "heads", "latent_norm", "encoders", "alignment"})
    trains = {"denoiser": ("denoiser", "heads")}
    cached_latents = True

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        t = m.flow.times(random["time"])
        z = frozen_posterior(m, batch).sample(random["posterior"])
        path = m.flow.sample(m.latent_norm(z), t, random["noise"])
        condition = drop_condition(m, batch.condition, random["label"])
        update("denoiser", denoising(m, path, t, condition, encode_targets(m, batch, step), step))
