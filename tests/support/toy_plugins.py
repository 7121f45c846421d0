"""Minimal plugins that satisfy the contracts; the broken plugins derive from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import (
    AdversarialLoss,
    AlignmentLoss,
    Condition,
    Denoiser,
    DenoiserOutput,
    Encoder,
    LatentShape,
    Posterior,
    ReconstructionLoss,
    Tokenizer,
)
from components.diffusion.random_numbers import generator
from components.nn.precision import at_least_fp32

WIDTH = 16


class ToyTokenizer(Tokenizer):
    """One convolution each for encoding and decoding: factor 4, 4 channels."""

    factor, channels = 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 4, stride=4)
        self.decoder = nn.ConvTranspose2d(4, 3, 4, stride=4)

    def encode(self, x: Tensor) -> Posterior:
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class ToyDenoiser(Denoiser):
    """Two layers with one token per latent position; tokens are aligned after the first."""

    width, align_depth, label_dropout = WIDTH, 1, 0.1

    def __init__(self, latent: LatentShape, num_classes: int) -> None:
        super().__init__()
        self.grid = latent.height
        self.null_label = num_classes
        self.embed = nn.Conv2d(latent.channels, WIDTH, 1)
        self.labels = nn.Embedding(num_classes + 1, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, latent.channels)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        tokens = self.tokens(x_t, t, condition)
        out = self.out(F.silu(self.blocks[1](tokens)))
        return DenoiserOutput(out.transpose(1, 2).unflatten(2, (self.grid, self.grid)), tokens)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        tokens = self.embed(x_t).flatten(2).transpose(1, 2) + self.labels(condition.label)[:, None]
        return F.silu(self.blocks[0](tokens + t.to(tokens.dtype)[:, None, None]))

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)


class ToyEncoder(Encoder):
    """A fixed random projection of each image patch."""

    embed_dim = 12

    def __init__(self, resolution: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("matrix", torch.randn(48, self.embed_dim, generator=generator("toy encoder")))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(images, 4 * self.grid)
        return F.unfold(x, 4, stride=4).transpose(1, 2) @ self.matrix.to(x.dtype)


class ToyL1(ReconstructionLoss):
    """Mean absolute error plus 1e-3 of the KL divergence, so that every weight of the tokenizer gets a gradient."""

    weight = 1.0

    def forward(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        return (x - x_hat).abs().mean() + 1e-3 * posterior.kl()


class ToyAdversary(AdversarialLoss):
    """Discriminator with one convolution."""

    weight = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 1, 4, stride=4)

    def units(self) -> Sequence[nn.Module]:
        return [self.network]

    def logits(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.network(x))

    def generator(self, x_hat: Tensor, step: int) -> Tensor:
        return -self.logits(x_hat).mean()

    def discriminator(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"hinge": F.relu(1 - self.logits(x)).mean() + F.relu(1 + self.logits(x_hat)).mean()}, {}


class ToyAlignment(AlignmentLoss):
    """Mean squared error after a linear head."""

    tokenizer_weight, denoiser_weight = 1.5, 0.5

    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(width, dimension) for dimension in embed_dims)

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.mse_loss(p, y) for p, y in zip(projected, targets)]).mean()
