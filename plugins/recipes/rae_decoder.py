"""The decoder of a representation autoencoder (RAE, arXiv 2510.11690): it learns to read noisy latents."""

from __future__ import annotations

import math

import torch

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import discriminate, frozen_posterior, reconstruction
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("rae_decoder")
class RaeDecoder:
    """Decoder and discriminator on a frozen encoder's latents, with noise on them (RAE); for the tokenizer rae.

    What the decoder reads is z + sigma n with n ~ N(0, I) and sigma ~ |N(0, noise_tau^2)| of each image, so that it
    forgives what a denoiser gets wrong (the published code draws sigma ~ U[0, noise_tau] instead).

    Args:
        noise_tau: scale of sigma, in units of the latents; 0: no noise. Published: 0.8.

    Raises:
        ValueError: a negative noise_tau.
    """

    uses = frozenset({"tokenizer", "reconstruction", "discriminator"})
    trains = {"tokenizer": ("tokenizer",), "discriminator": ("discriminator",)}
    trains_decoder_alone = True

    def __init__(self, *, noise_tau: float = 0.8) -> None:
        if noise_tau < 0:
            raise ValueError(f"recipe.noise_tau = {noise_tau}: expected 0 or more")
        self.noise_tau = noise_tau

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        x = batch.images
        posterior = frozen_posterior(m, batch)
        # Uniform draws become half-normal ones by the inverse of their distribution function.
        sigma = self.noise_tau * math.sqrt(2) * torch.erfinv(draws.time)
        noise = sigma[:, None, None, None] * draws.posterior
        x_hat = m.tokenizer.decode(posterior.mean + noise.to(posterior.mean.dtype))
        with frozen(m.discriminator):
            update("tokenizer", reconstruction(m, x, x_hat, posterior, step))
        discriminate(m, x, x_hat, step, update)
