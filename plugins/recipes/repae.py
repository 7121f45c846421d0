"""REPA-E (arXiv 2504.10483): end-to-end training of tokenizer and denoiser with representation alignment."""

from __future__ import annotations

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import alignment, denoising, discriminate, drop_labels, encode_targets, reconstruction
from components.distributed.freeze import frozen
from components.registry import recipes


@recipes.register("repae")
class RepaE:
    """Train tokenizer, discriminator, denoiser and alignment heads jointly (REPA-E).

    The alignment loss reaches the tokenizer through the denoiser's first blocks; the diffusion loss does not reach it.
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

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        x, labels = batch.images, batch.labels
        targets = encode_targets(m, batch, step)
        t = m.flow.times(draws.time)

        posterior = m.tokenizer.encode(x)
        z = posterior.sample(draws.posterior)
        x_hat = m.tokenizer.decode(z)
        with frozen(m.denoiser, m.heads, m.discriminator):
            # Running statistics and no label dropout: this pass does not train the denoiser and must not affect it.
            path = m.flow.at(m.latent_norm(z), t, draws.noise)
            terms = reconstruction(m, x, x_hat, posterior, step)
            if targets:
                tokens = m.denoiser.tokens(path.x_t, t, labels)
                terms |= alignment(m, tokens, targets, m.alignment.tokenizer_weight, step)
            update("tokenizer", terms)

        discriminate(m, x, x_hat, step, update)

        # Stop-gradient: without it the diffusion loss collapses the latents (FID 444 in the paper's ablation).
        path = m.flow.at(m.latent_norm.batch(z.detach()), t, draws.noise)
        update("denoiser", denoising(m, path, t, drop_labels(m, labels, draws.label), targets, step))
