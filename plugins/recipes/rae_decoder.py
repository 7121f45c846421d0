"""Decoder training for a representation autoencoder (RAE, arXiv 2510.11690), on noisy latents."""

from __future__ import annotations

import math

import torch

from components.contracts import Batch, Distribution, LatentShape, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import discriminate, frozen_posterior, reconstruction
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("rae_decoder")
class RaeDecoder(Recipe):
    """Train decoder and discriminator on noisy latents of a frozen encoder (RAE); for the tokenizer rae.

    The decoder's input is z + sigma n, with n ~ N(0, I) and sigma ~ |N(0, noise_tau^2)| per image, which makes it
    robust to errors of the denoiser. (The published code samples sigma ~ U[0, noise_tau] instead.)

    Args:
        noise_tau: scale of sigma, in units of the latents; 0: no noise. Published: 0.8.

    Raises:
        ValueError: ``noise_tau`` is negative.
    """

    uses = frozenset({"tokenizer", "reconstruction", "discriminator"})
    trains = {"tokenizer": ("tokenizer",), "discriminator": ("discriminator",)}
    trains_decoder_alone = True

    def __init__(self, *, noise_tau: float = 0.8) -> None:
        if noise_tau < 0:
            raise ValueError(f"recipe.noise_tau = {noise_tau}: expected at least 0")
        self.noise_tau = noise_tau

    def random_numbers(self, m: Modules, latent: LatentShape) -> dict[str, Distribution]:
        return {
            "noise": Distribution("normal", latent, key="posterior"),
            "sigma": Distribution("uniform", key="time"),
        }

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        x = batch.images
        posterior = frozen_posterior(m, batch)
        # Inverse transform sampling: a uniform number becomes a half-normal sigma.
        sigma = self.noise_tau * math.sqrt(2) * torch.erfinv(random["sigma"])
        noise = sigma[:, None, None, None] * random["noise"]
        x_hat = m.tokenizer.decode(posterior.mean + noise.to(posterior.mean.dtype))
        with frozen(m.discriminator):
            update("tokenizer", reconstruction(m, x, x_hat, posterior, step, random))
        discriminate(m, x, x_hat, step, update, random)
