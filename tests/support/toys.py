"""Tiny modules and configs shared by the tests."""

from __future__ import annotations

import torch
from torch import nn

from components.contracts import Batch, Condition, Distribution, Encoder, LatentShape, Modules, RandomNumbers, Recipe
from components.diffusion.flow import Flow
from components.diffusion.random_numbers import draw, generator
from components.nn.latent_norm import LatentNorm
from plugins.denoisers.sit import SiT
from plugins.losses.cosine import Cosine
from plugins.losses.patchgan import PatchGAN
from plugins.losses.reconstruction import KL, L1
from plugins.tokenizers.autoencoder_kl import AutoencoderKL

LATENT = LatentShape(4, 8, 8)
CLASSES = 10
NUMBERS = Recipe().random_numbers(Modules(), LATENT) | {"sigma": Distribution("uniform", key="time")}

TOML = """
[training]
steps = 6
batch_size = 8
resolution = 32
precision = "fp32"

[run]
log_every = 1
checkpoint_every = 2

[recipe]
name = "repae"

[tokenizer]
name = "autoencoder_kl"
latent_channels = 4
channels = 8
multipliers = [1, 2, 2]
norm_groups = 4
res_blocks = 1

[denoiser]
name = "sit"
width = 32
depth = 2
heads = 2
align_depth = 1

[encoders.tiny_vit]

[losses.l1]
[losses.kl]
[losses.patchgan]
channels = 8
layers = 2
[losses.cosine]
head_width = 32

[dataset]
name = "shapes"
size = 40

[latent_norm]
images = 16

[sampling]
every = 0
images = 10
steps = 2

[loader]
workers = 0

[ema]
decay = 0.9
"""


class PatchMeans(Encoder):
    """Stand-in for an encoder: a fixed random projection of each image patch."""

    embed_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(192, self.embed_dim, generator=generator("patch means")))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
        return patches @ self.matrix.to(images.dtype)


def modules(seed: int = 0, dtype: torch.dtype = torch.float64) -> Modules:
    """Tiny version of every module; the denoiser's zero-initialized weights are randomized so that all of them act."""
    torch.manual_seed(seed)
    m = Modules(
        tokenizer=AutoencoderKL(channels=8, multipliers=[1, 2, 2], norm_groups=4, res_blocks=1),
        denoiser=SiT(LATENT, CLASSES, width=32, depth=3, heads=2, align_depth=2),
        latent_norm=LatentNorm(4),
        encoders={"patches": PatchMeans()},
        reconstruction={"l1": L1(), "kl": KL()},
        discriminator=PatchGAN(channels=8, layers=2),
        alignment=Cosine(head_width=16),
        flow=Flow(),
    )
    m.heads = m.alignment.make_heads(32, [PatchMeans.embed_dim], 4)
    for module in m.named().values():
        module.to(dtype)
        for p in module.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.05)
    return m


def batch(step: int = 0, size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Batch, RandomNumbers]:
    """Images, labels and random numbers of one micro-batch."""
    g = generator("batch", step)
    images = torch.rand(size, 3, 32, 32, generator=g, dtype=dtype) * 2 - 1
    labels = torch.randint(CLASSES, (size,), generator=g)
    numbers = draw(0, step, range(size), size, NUMBERS)
    return Batch(images, Condition(labels)), {name: x.to(dtype) for name, x in numbers.items()}
