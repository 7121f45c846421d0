"""Latent diffusion without alignment (SiT, arXiv 2401.08740): the baseline."""

from __future__ import annotations

import torch

from components.contracts import Batch, Modules, Update
from components.draws import Draws
from components.objectives import denoising, drop_labels
from components.registry import recipes


@recipes.register("ldm")
class Ldm:
    """Denoiser alone on a frozen tokenizer, velocity matching only (SiT)."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})
    trains = {"denoiser": ("denoiser",)}

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        x, labels = batch
        t = m.flow.times(draws.time)
        with torch.no_grad():
            z = m.tokenizer.encode(x).sample(draws.posterior)
        path = m.flow.at(m.latent_norm(z), t, draws.noise)
        update("denoiser", denoising(m, path, t, drop_labels(m, labels, draws.label)))
