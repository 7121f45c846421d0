"""Every random number of a training step, the same for any number of ranks, of micro-batches, and after a resume."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from components.contracts import Draws, LatentShape


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by all of ``key``: the same key gives the same numbers on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def draw(seed: int, step: int, positions: range, batch_size: int, latent: LatentShape, extra_dim: int = 0) -> Draws:
    """The numbers that belong to some positions of step ``step``'s global batch.

    Cost: all ``batch_size`` latents are drawn on the CPU and sliced (2M normals for 256 latents of 4 x 32 x 32,
    some 20 ms), off the training thread; in return no rank can repeat another's numbers.

    Args:
        seed: of the run.
        step: counted from 0.
        positions: this micro-batch's places in the global batch, within [0, batch_size).
        batch_size: images of the global batch.
        latent: shape of one latent.
        extra_dim: features D_e of the vector that the denoiser denoises with the latent; 0: none.
    """
    rows = slice(positions.start, positions.stop)

    def numbers(name: str, sample, *shape: int) -> Tensor:
        return sample(batch_size, *shape, generator=generator(seed, step, name))[rows].clone()

    return Draws(
        posterior=numbers("posterior", torch.randn, *latent),
        noise=numbers("noise", torch.randn, *latent),
        time=numbers("time", torch.rand),
        label=numbers("label", torch.rand),
        extra=numbers("extra", torch.randn, extra_dim),
    )
