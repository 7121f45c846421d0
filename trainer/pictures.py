"""What a run looks like: reconstructions of fixed images, and samples from fixed noise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from components.draws import generator
from components.ema import Ema
from components.samplers import Guidance, sample_ode, sample_sde
from trainer.assemble import Parts
from trainer.config import Config

COLUMNS = 10
MAX_RECONSTRUCTIONS = 20


def averaged(parts: Parts, ema: Ema | None, name: str):
    """The averaged copy of a module where there is one, else the module itself."""
    return ema.modules[name] if ema is not None and name in ema.modules else getattr(parts.modules, name)


@torch.no_grad()
def sample_images(config: Config, parts: Parts, ema: Ema | None, device: torch.device, count: int) -> tuple:
    """Images (count, 3, R, R) in [-1, 1] from the averaged weights, and their labels (count,), classes in turn.

    The noise depends on the seed alone: grids of different steps show the same draws.
    """
    s = config.sampling
    denoiser = averaged(parts, ema, "denoiser")
    guidance = Guidance(s.guidance, s.guidance_low, s.guidance_high)
    labels = torch.arange(count, device=device) % parts.num_classes
    dtype = next(denoiser.parameters()).dtype
    images = []
    for first in range(0, count, 64):  # bounds the memory
        rows = slice(first, min(first + 64, count))
        shape = (labels[rows].numel(), *parts.latent)
        noise = torch.randn(shape, generator=generator(config.training.seed, "samples", first)).to(device, dtype)
        if s.method == "sde":

            def step_noise(i: int, shape=shape, first=first) -> Tensor:
                return torch.randn(shape, generator=generator(config.training.seed, "samples", first, i)).to(device)

            flow = parts.modules.flow
            z = sample_sde(
                denoiser, noise, labels[rows], steps=s.steps, step_noise=step_noise, flow=flow, guidance=guidance
            )
        else:
            heun = s.method == "heun"
            z = sample_ode(denoiser, noise, labels[rows], steps=s.steps, guidance=guidance, heun=heun)
        z = averaged(parts, ema, "latent_norm").invert(z).to(dtype)
        images.append(averaged(parts, ema, "tokenizer").decode(z).float().clamp(-1, 1))
    return torch.cat(images), labels


@torch.no_grad()
def reconstruct(parts: Parts, ema: Ema | None, images: Tensor) -> Tensor:
    """Decoded posterior means of images (B, 3, R, R) in [-1, 1]."""
    tokenizer = averaged(parts, ema, "tokenizer")
    x = images.to(next(tokenizer.parameters()).dtype)
    return tokenizer.decode(tokenizer.encode(x).mean).float().clamp(-1, 1)


def fixed_images(parts: Parts, device: torch.device) -> Tensor:
    """The dataset's first images, (B, 3, R, R) in [-1, 1]."""
    count = min(MAX_RECONSTRUCTIONS, len(parts.dataset))
    images = torch.stack([parts.dataset[i].image for i in range(count)])
    return images.to(device).float().div_(127.5).sub_(1)


def grid(images: Tensor, columns: int = COLUMNS) -> Tensor:
    """(B, 3, R, R) in [-1, 1] -> one picture (3, H, W) in [0, 1]."""
    from torchvision.utils import make_grid

    return make_grid(images.float().cpu().clamp(-1, 1) * 0.5 + 0.5, nrow=columns, padding=2, pad_value=1.0)


def side_by_side(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Rows of originals, each above the row of its reconstructions."""
    rows = []
    for a, b in zip(originals.split(COLUMNS), reconstructions.split(COLUMNS)):
        rows += [a, b]
    return grid(torch.cat(rows), columns=min(COLUMNS, len(originals)))


def save_png(picture: Tensor, path: Path) -> None:
    from torchvision.utils import save_image

    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, path)
