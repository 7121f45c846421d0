"""The losses that recipes share, each as named, weighted terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.contracts import Batch, Modules, Posterior, Tokens, Update, Weighted
from components.diffusion.flow import PathPoint
from components.monitor.latent_statistics import observe
from components.monitor.phases import phase
from components.nn.precision import at_least_fp32


def reconstruction(m: Modules, x: Tensor, x_hat: Tensor, posterior: Posterior, step: int) -> dict[str, Weighted]:
    """The tokenizer's own terms: every configured reconstruction loss, and the generator's side of the GAN."""
    observe(posterior.mean)  # of a recipe without a denoiser, which has shown its latents already
    terms = {name: Weighted(loss.weight, loss(x, x_hat, posterior)) for name, loss in m.reconstruction.items()}
    if m.discriminator is not None:
        terms["gan"] = Weighted(m.discriminator.weight, m.discriminator.generator(x_hat, step))
    return terms


def discriminate(m: Modules, x: Tensor, x_hat: Tensor, step: int, update: Update) -> None:
    """The discriminator's update, where there is one; the reconstruction's graph stays out of it."""
    if m.discriminator is not None:
        terms, report = m.discriminator.discriminator(x, x_hat.detach(), step)
        update("discriminator", {name: Weighted(1.0, value) for name, value in terms.items()}, **report)


def velocity_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity (B, C, h, w), in at least float32: a scalar."""
    return (at_least_fp32(predicted) - at_least_fp32(target)).square().mean()


def alignment(m: Modules, tokens: Tokens, targets: Sequence[Tensor], weight: float, step: int) -> dict[str, Weighted]:
    """The term "align": the denoiser's hidden tokens against every encoder's, at every depth, through a head each.

    Its value is the mean over depths and the weighted mean over encoders.

    Args:
        tokens: as the denoiser gives them.
        targets: of :func:`encode_targets`; without any there is no term.
        weight: of the term at full strength.
        step: counted from 0; the loss may have a schedule.
    """
    if not targets:
        return {}
    depths = tokens if isinstance(tokens, tuple) else (tokens,)
    pairs = [(hidden, y) for hidden in depths for y in targets]
    values = [m.alignment.align([head(hidden)], [y]) for head, (hidden, y) in zip(m.heads, pairs, strict=True)]
    shares = [m.encoder_weights.get(label, 1.0) for label in m.encoders] * len(depths)
    total = torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum() / sum(shares)
    return {"align": Weighted(weight * strength(m, step), total)}


def strength(m: Modules, step: int) -> float:
    """The factor of the alignment loss at step ``step``, counted from 0, by its schedule; 1 without one."""
    schedule = getattr(m.alignment, "strength", None)
    return 1.0 if schedule is None else schedule(step)


def frozen_posterior(m: Modules, batch: Batch) -> Posterior:
    """q(z|x) of a tokenizer that does not learn: as cached, or else of the images, without gradients."""
    if batch.posterior is not None:
        return batch.posterior
    with torch.no_grad(), phase("tokenizer"):
        return m.tokenizer.encode(batch.images)


def encode_targets(m: Modules, batch: Batch, step: int) -> list[Tensor]:
    """Each frozen encoder's patch tokens (B, N, D_k): as cached, or else of the images, without gradients.

    None at steps (counted from 0) where the alignment loss's schedule has come to zero.
    """
    if not strength(m, step):
        return []
    cached = batch.features or {}
    with torch.no_grad(), phase("encoders"):
        return [cached[k] if k in cached else encoder(batch.images) for k, encoder in m.encoders.items()]


def class_tokens(m: Modules, batch: Batch) -> list[Tensor]:
    """Each frozen encoder's vector of the image (B, D_k), without gradients; every encoder must offer ``embed``."""
    with torch.no_grad(), phase("encoders"):
        return [encoder.embed(batch.images) for encoder in m.encoders.values()]


def drop_labels(m: Modules, labels: Tensor, u: Tensor) -> Tensor:
    """Replaces labels by the null label where u ~ U[0, 1) falls below the denoiser's ``label_dropout``."""
    return torch.where(u < m.denoiser.label_dropout, m.denoiser.null_label, labels)


def denoising(
    m: Modules, path: PathPoint, t: Tensor, labels: Tensor, targets: Sequence[Tensor] = (), step: int = 0
) -> dict[str, Weighted]:
    """The denoiser's terms: velocity matching, and :func:`alignment` where targets are given."""
    out = m.denoiser(path.x_t, t, labels)
    terms = {"velocity": Weighted(1.0, velocity_mse(out.velocity, path.velocity))}
    if targets:
        terms |= alignment(m, out.tokens, targets, m.alignment.denoiser_weight, step)
    return terms
