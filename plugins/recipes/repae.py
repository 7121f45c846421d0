"""REPA-E (arXiv 2504.10483): end-to-end training of tokenizer and denoiser with representation alignment."""

from __future__ import annotations

from components.contracts import Batch, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import (
    alignment,
    denoising,
    discriminate,
    drop_condition,
    encode_targets,
    reconstruction,
)
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("repae")
class RepaE(Recipe):
    """Train tokenizer, discriminator, denoiser and alignment heads jointly (REPA-E).

    The alignment loss reaches the tokenizer through the denoiser's first blocks; the diffusion loss does not reach it.

    Args:
        stop_gradient: false: the diffusion loss reaches the tokenizer, too, which ruins it: an ablation of the paper.
    """

    uses = frozenset(
        {
            "tokenizer",
            "denoiser",
            "heads",
            "latent_norm",
            "encoders",
            "reconstruction",
            "discriminator",
            "alignment",
        }
    )
    trains = {
        "tokenizer": ("tokenizer",),
        "discriminator": ("discriminator",),
        "denoiser": ("denoiser", "heads"),
    }

    def __init__(self, *, stop_gradient: bool = True) -> None:
        self.stop_gradient = stop_gradient

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        x, condition = batch.images, batch.condition
        targets = encode_targets(m, batch, step)
        t = m.flow.times(random["time"])

        posterior = m.tokenizer.encode(x)
        z = posterior.sample(random["posterior"])
        x_hat = m.tokenizer.decode(z)
        with frozen(m.denoiser, m.heads, m.discriminator):
            # Running statistics and no label dropout: this pass does not train the denoiser and must not affect it.
            path = m.flow.sample(m.latent_norm(z), t, random["noise"])
            terms = reconstruction(m, x, x_hat, posterior, step, random)
            if targets:
                tokens = m.denoiser.tokens(path.x_t, t, condition)
                terms |= alignment(m, tokens, targets, m.alignment.tokenizer_weight, step)
            if not self.stop_gradient:
                path = m.flow.sample(m.latent_norm.batch(z, update=False), t, random["noise"])
                terms |= denoising(m, path, t, drop_condition(m, condition, random["label"]))
            update("tokenizer", terms)

        discriminate(m, x, x_hat, step, update, random)

        # Stop-gradient: without it the diffusion loss collapses the latents (FID 444 in the paper's ablation).
        path = m.flow.sample(m.latent_norm.batch(z.detach()), t, random["noise"])
        update("denoiser", denoising(m, path, t, drop_condition(m, condition, random["label"]), targets, step))
