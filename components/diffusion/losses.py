"""Losses shared by recipes, as named, weighted terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.contracts import (
    Batch,
    Condition,
    DenoiserOutput,
    LossTerm,
    Modules,
    Posterior,
    RandomNumbers,
    Tokens,
    Update,
)
from components.diffusion.adaptive_weight import adaptive_reconstruction
from components.diffusion.flow import PathSample
from components.diffusion.random_numbers import of_discriminator
from components.monitor.latent_statistics import observe
from components.monitor.phases import phase
from components.nn.precision import at_least_fp32


def reconstruction(
    m: Modules, x: Tensor, x_hat: Tensor, posterior: Posterior, step: int, random: RandomNumbers | None = None
) -> dict[str, LossTerm]:
    """The tokenizer's terms: all configured reconstruction losses and the generator loss of the GAN.

    ``random`` are the step's random numbers, of which some adversarial losses need their part.
    """
    observe(posterior.mean)  # a no-op if the latent norm has already observed this step's latents
    if m.last_layer is not None:
        return adaptive_reconstruction(m, x, x_hat, posterior, step, random)
    terms = {name: LossTerm(loss.weight, loss(x, x_hat, posterior)) for name, loss in m.reconstruction.items()}
    if m.discriminator is not None:
        value = m.discriminator.generator(x_hat, step, **of_discriminator(m.discriminator, random))
        terms["gan"] = LossTerm(m.discriminator.weight, value)
    return terms


def discriminate(
    m: Modules, x: Tensor, x_hat: Tensor, step: int, update: Update, random: RandomNumbers | None = None
) -> None:
    """Update the discriminator, if any, with the reconstruction detached; ``random`` as in :func:`reconstruction`."""
    if m.discriminator is not None:
        numbers = of_discriminator(m.discriminator, random)
        terms, report = m.discriminator.discriminator(x, x_hat.detach(), step, **numbers)
        update("discriminator", {name: LossTerm(1.0, value) for name, value in terms.items()}, **report)


def velocity_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of velocities (B, C, h, w), a scalar in at least fp32."""
    return (at_least_fp32(predicted) - at_least_fp32(target)).square().mean()


def velocity_terms(m: Modules, out: DenoiserOutput, path: PathSample) -> dict[str, LossTerm]:
    """Velocity matching of the denoiser's output and, if it makes one, of its early prediction."""
    terms = {"velocity": LossTerm(1.0, velocity_mse(out.velocity, path.velocity))}
    if out.early is not None:
        terms["early_velocity"] = LossTerm(m.denoiser.early_weight, velocity_mse(out.early, path.velocity))
    return terms


def alignment(m: Modules, tokens: Tokens, targets: Sequence[Tensor], weight: float, step: int) -> dict[str, LossTerm]:
    """The term "align": aligns the denoiser's hidden tokens with each encoder's, with one head per depth and encoder.

    Its value is the mean over depths and the weighted mean over encoders.

    Args:
        tokens: hidden tokens from the denoiser, a tuple if there are several depths.
        targets: from :func:`encode_targets`; if empty, there is no term.
        weight: weight of the term before the loss's schedule.
        step: counted from 0.
    """
    if not targets:
        return {}
    depths = tokens if isinstance(tokens, tuple) else (tokens,)
    pairs = [(hidden, y) for hidden in depths for y in targets]
    values = [m.alignment.align([head(hidden)], [y]) for head, (hidden, y) in zip(m.heads, pairs, strict=True)]
    shares = [m.encoder_weights.get(label, 1.0) for label in m.encoders] * len(depths)
    total = torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum() / sum(shares)
    return {"align": LossTerm(weight * m.alignment.strength(step), total)}


def frozen_posterior(m: Modules, batch: Batch) -> Posterior:
    """Posterior q(z|x) of a frozen tokenizer: from the cache, or computed from the images without gradients."""
    if batch.posterior is not None:
        return batch.posterior
    with torch.no_grad(), phase("tokenizer"):
        return m.tokenizer.encode(batch.images)


def encode_targets(m: Modules, batch: Batch, step: int) -> list[Tensor]:
    """Patch tokens (B, N, D_k) of each frozen encoder, from the cache or computed from the images without gradients.

    Empty if the alignment loss's schedule is 0 at ``step``, counted from 0.
    """
    if not m.alignment.strength(step):
        return []
    cached = batch.features or {}
    with torch.no_grad(), phase("encoders"):
        return [cached[k] if k in cached else encoder(batch.images) for k, encoder in m.encoders.items()]


def class_tokens(m: Modules, batch: Batch) -> list[Tensor]:
    """Image embedding (B, D_k) of each frozen encoder, without gradients."""
    with torch.no_grad(), phase("encoders"):
        return [encoder.embed(batch.images) for encoder in m.encoders.values()]


def drop_condition(m: Modules, condition: Condition, u: Tensor) -> Condition:
    """Replace conditions by the null condition where u (B,) ~ U[0, 1) is below the denoiser's ``label_dropout``."""

    def where(null: Tensor, value: Tensor) -> Tensor:
        return torch.where((u < m.denoiser.label_dropout).view(-1, *[1] * (value.ndim - 1)), null, value)

    return m.denoiser.null_condition(condition).combine(where, condition)


def denoising(
    m: Modules, path: PathSample, t: Tensor, condition: Condition, targets: Sequence[Tensor] = (), step: int = 0
) -> dict[str, LossTerm]:
    """The denoiser's terms: velocity matching and, if there are targets, :func:`alignment`."""
    out = m.denoiser(path.x_t, t, condition)
    terms = velocity_terms(m, out, path)
    if targets:
        terms |= alignment(m, out.tokens, targets, m.alignment.denoiser_weight, step)
    return terms
