"""Adversarial hinge loss of RAE: heads on the tokens of a frozen DINO (arXiv 2510.11690, 2301.09515)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import AdversarialLoss, Distribution, Network, RandomNumbers
from components.nn.inner_encoder import load_encoder, make_encoder
from components.nn.precision import at_least_fp32, no_autocast
from components.registry import File, losses

WHAT = "losses.dino_gan"
# Not DINO's own exact GELU, but as published.
DINO = {"model": "vit_small_patch8_224.dino", "resize": "bilinear", "options": {"act_layer": "gelu_tanh"}}
BLOCKS = [2, 5, 8, 11]
KERNEL = 9  # tokens
EPS = 1e-6  # of the heads' norms
NUMBERS = 5  # per augmented image
GENERATOR, FAKE, REAL = range(3)  # places of the images in the random numbers


class SpectralConv1d(nn.Conv1d):
    """Convolution with circular padding, whose weight is divided by an estimate of its largest singular value.

    Spectral normalization (arXiv 1802.05957) as in ``torch.nn.utils.spectral_norm``: the singular vectors are buffers,
    which start at random and approach the largest ones by one power iteration per call with ``iterate``. The gradient
    includes that of the singular value, with constant vectors.
    """

    u: Tensor
    v: Tensor

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(channels, out_channels, kernel_size)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(channels * kernel_size), dim=0))

    def forward(self, x: Tensor, iterate: bool = False) -> Tensor:  # type: ignore[override]
        """(B, C, N) -> (B, out, N)."""
        matrix = self.weight.flatten(1)
        with no_autocast(x):
            with torch.no_grad():
                u, v = self.u.clone(), self.v.clone()  # what the backward pass needs must not change with the buffers
                if iterate:
                    v = F.normalize(matrix.T @ u, dim=0)
                    u = F.normalize(matrix @ v, dim=0)
                    self.u.copy_(u)
                    self.v.copy_(v)
            weight = self.weight / (u @ (matrix @ v))
        side = self.kernel_size[0] // 2
        return F.conv1d(F.pad(x, (side, side), mode="circular") if side else x, weight, self.bias)


class Head(nn.Module):
    """Tokens (B, D, N) -> one logit per token (B, N), in at least fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = SpectralConv1d(width, width, 1)
        self.token_norm = nn.InstanceNorm1d(width, EPS, affine=True)
        self.around = SpectralConv1d(width, width, KERNEL)
        self.around_norm = nn.InstanceNorm1d(width, EPS, affine=True)
        self.logit = SpectralConv1d(width, 1, 1)

    def forward(self, x: Tensor, iterate: bool) -> Tensor:
        x = F.leaky_relu(self.token_norm(at_least_fp32(self.token(x, iterate))), 0.2)
        y = F.leaky_relu(self.around_norm(at_least_fp32(self.around(x, iterate))), 0.2)
        return at_least_fp32(self.logit((x + y) / math.sqrt(2), iterate)).flatten(1)


class Heads(Network):
    """One head for each of several tokens (B, N, D) -> all logits (B, heads * N)."""

    keep_fp32 = True
    compiles = False  # compiled code saves the singular vectors' buffers themselves, which the next call changes

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width) for _ in range(count))

    def forward(self, *tokens: Tensor, iterate: bool) -> Tensor:
        return torch.cat([head(x.transpose(1, 2), iterate) for head, x in zip(self.heads, tokens, strict=True)], dim=1)


@losses.register("dino_gan")
class DinoGAN(AdversarialLoss):
    """Hinge GAN loss of RAE: a frozen DINO ViT-S/8, and trained heads on the tokens of several of its blocks.

    Images are augmented by random translation, brightness, saturation and contrast (DiffAugment, arXiv 2006.10738),
    each on its own; reconstructions that the discriminator learns from are first rounded to 8 bits. Each head, one per
    block and one more for the last, normalizes per image and channel, and has spectrally normalized convolutions along
    the row-major sequence of tokens. Their power iteration advances when the discriminator learns, first on
    reconstructions, then on images; with accumulation for each micro-batch.

    The frozen network is saved in checkpoints, but never trained. A loss that has not started is zero and carries no
    graph, and before ``warmup_steps`` nothing runs.

    Args:
        weight: weight of the generator's loss in the tokenizer's loss.
        adaptive: multiply ``weight`` by |grad L_rec| / (|grad L_gan| + 1e-6), at most 1e4, with the gradients of the
            decoder's last weight.
        start_step: first step with the generator's loss, counted from 0. Published: after 8 of 16 epochs.
        warmup_steps: steps before ``start_step`` in which the discriminator trains alone. Published: 2 epochs.
        augment: augment the discriminator's images.
        encoder: encoder plugin with blocks to use as the frozen network; none: DINO's ViT-S/8 (timm).
        encoder_options: options of that plugin; without ``encoder``, they are added to those of the published network.
        checkpoint: weights file of the frozen network; none: as the encoder plugin does, which is to download them.
        grid: tokens per side; DINO's images are resized to 8 px per token, bilinearly.
        blocks: blocks of the frozen network with a head each, counted from 0; none: [2, 5, 8, 11].
        precision: of frozen network and heads: "fp32", or "run": bf16 in bf16 runs, which is faster. Norms and losses
            are always computed in fp32.

    Raises:
        ValueError: the encoder does not exist, refuses its options or has no such blocks; ``grid`` is below 2;
            ``start_step`` is negative, or ``warmup_steps`` is not in [0, start_step].
    """

    keep_fp32 = True

    def __init__(
        self,
        *,
        weight: float = 0.75,
        adaptive: bool = True,
        start_step: int = 0,
        warmup_steps: int = 0,
        augment: bool = True,
        encoder: str | None = None,
        encoder_options: dict[str, Any] | None = None,
        checkpoint: File | None = None,
        grid: int = 28,
        blocks: list[int] | None = None,
        precision: Literal["fp32", "run"] = "fp32",
    ) -> None:
        super().__init__()
        if start_step < 0:
            raise ValueError(f"{WHAT}: start_step = {start_step}; expected at least 0")
        if not 0 <= warmup_steps <= start_step:
            raise ValueError(f"{WHAT}: warmup_steps = {warmup_steps}; expected 0 to start_step = {start_step}")
        if grid < 2:
            raise ValueError(f"{WHAT}: grid = {grid}; expected at least 2")
        self.weight, self.adaptive = weight, adaptive
        self.start_step, self.warmup_steps, self.precision = start_step, warmup_steps, precision
        self.random_numbers = {"augmentation": Distribution("uniform", (3, NUMBERS))} if augment else {}
        options = ({} if encoder else DINO) | (encoder_options or {})
        if checkpoint:
            options["checkpoint"] = checkpoint
        self.encoder_name = encoder or "timm"
        self.encoder = make_encoder(WHAT, self.encoder_name, options, 8 * grid, grid)
        self.blocks = BLOCKS if blocks is None else blocks
        last = self.encoder.depth - 1
        if not self.blocks or sorted(set(self.blocks)) != self.blocks or self.blocks[0] < 0 or self.blocks[-1] > last:
            has = f"has blocks 0 to {last}" if last >= 0 else "returns no tokens of its blocks"
            raise ValueError(
                f"{WHAT}: blocks = {self.blocks}; expected ascending blocks of the encoder, but "
                f"'{options.get('model', encoder)}' {has}"
            )
        self.heads = Heads(len(self.blocks) + 1, self.encoder.embed_dim)

    def train(self, mode: bool = True) -> DinoGAN:
        """Set the mode of the heads; the frozen network stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def load_weights(self) -> None:
        """Load the frozen network.

        Raises:
            WeightsError: its weights are missing or do not fit.
        """
        load_encoder(self.encoder, self.encoder_name, "loss dino_gan", f"[{WHAT}]")

    def units(self) -> Sequence[nn.Module]:
        """Return the frozen network and all heads as one unit."""
        return [self.encoder, self.heads]

    def compiled_methods(self) -> Sequence[Any]:
        """Return the frozen network's method that is used."""
        return [self.encoder.block_tokens]

    def generator(self, x_hat: Tensor, step: int, random: RandomNumbers = {}) -> Tensor:  # noqa: B006
        """Return the generator loss -mean(D(x_hat)), a scalar; zero before ``start_step``.

        Args:
            x_hat: reconstructions (B, 3, R, R).
            step: current step, counted from 0.
            random: ``augmentation`` (B, 3, 5) in [0, 1), unless ``augment`` is false.
        """
        if step < self.start_step:
            return at_least_fp32(x_hat.new_zeros(()))
        return -self._logits(x_hat, random, GENERATOR).mean()

    def discriminator(
        self,
        x: Tensor,
        x_hat: Tensor,
        step: int,
        random: RandomNumbers = {},  # noqa: B006
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the hinge loss (Lim and Ye 2017, arXiv 1705.02894).

        Args:
            x: images (B, 3, R, R) in [-1, 1].
            x_hat: reconstructions, detached.
            step: current step, counted from 0.
            random: as in :meth:`generator`.

        Returns:
            Loss terms: ``hinge`` = 0.5 (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))). Values to report:
            ``logits_real`` and ``logits_fake``, detached means on this rank; none before the discriminator starts.
        """
        if step < self.start_step - self.warmup_steps:
            return {"hinge": at_least_fp32(x.new_zeros(()))}, {}
        rounded = ((at_least_fp32(x_hat).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        fake = self._logits(rounded, random, FAKE, iterate=True)
        real = self._logits(x, random, REAL, iterate=True)
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return {"hinge": hinge}, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}

    def _logits(self, images: Tensor, random: RandomNumbers, place: int, iterate: bool = False) -> Tensor:
        """Logits (B, heads * N) of images (B, 3, R, R)."""
        images = at_least_fp32(images)
        if self.random_numbers:
            images = augmented(images, random["augmentation"][:, place])
        last = self.encoder.depth - 1
        chosen = sorted({*self.blocks, last})
        with contextlib.nullcontext() if self.precision == "run" else no_autocast(images):
            tokens = dict(zip(chosen, self.encoder.block_tokens(images, chosen), strict=True))
            return self.heads(*(tokens[block] for block in (last, *self.blocks)), iterate=iterate)


def augmented(x: Tensor, u: Tensor) -> Tensor:
    """DiffAugment's translation (zeros outside) and color jitter of images (B, 3, H, W), differentiable by ``x``.

    Args:
        u: (B, 5) in [0, 1): translation down and across, up to an eighth of the side; brightness, -0.5 to 0.5;
            saturation, 0 to 2; contrast, 0.5 to 1.5.
    """
    for dim, numbers in ((2, u[:, 0]), (3, u[:, 1])):
        side = x.shape[dim]
        most = round(0.125 * side)
        shift = (numbers * (2 * most + 1)).long().clamp(max=2 * most) - most
        source = torch.arange(side, device=x.device) + shift[:, None]
        shape = [len(x), 1, 1, 1]
        shape[dim] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        # Colliding indices are outside, where gradients are zero: their sum does not depend on the order.
        x = x.gather(dim, source.clamp(0, side - 1).view(shape).expand_as(x)) * inside
    brightness, saturation, contrast = u[:, 2:, None, None, None].to(x.dtype).unbind(1)
    x = x + (brightness - 0.5)
    gray = x.mean(1, keepdim=True)
    x = (x - gray) * (2 * saturation) + gray
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean
