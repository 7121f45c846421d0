"""REPA (arXiv 2410.06940): latent diffusion aligned with a visual encoder."""

from __future__ import annotations

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import denoising, drop_labels, encode_targets, frozen_posterior
from components.registry import recipes


@recipes.register("repa")
class Repa:
    """Train denoiser and alignment heads on a frozen tokenizer (REPA); also second stage of REPA-E's best result."""

    uses = frozenset({"tokenizer", "denoiser", "heads", "latent_norm", "encoders", "alignment"})
    trains = {"denoiser": ("denoiser", "heads")}
    cached_latents = True

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        t = m.flow.times(draws.time)
        z = frozen_posterior(m, batch).sample(draws.posterior)
        path = m.flow.at(m.latent_norm(z), t, draws.noise)
        labels = drop_labels(m, batch.labels, draws.label)
        update("denoiser", denoising(m, path, t, labels, encode_targets(m, batch, step), step))
