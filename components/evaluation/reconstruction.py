"""PSNR and SSIM of 8-bit images."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SIDE = 11  # SSIM's window


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; infinite for equal images.

    Args:
        x: uint8 (B, 3, R, R); the peak is 255.
        y: likewise.
    """
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), (B,) float64, at most 1.

    Gaussian window of 11 pixels with a deviation of 1.5, per colour channel, k1 = 0.01, k2 = 0.03; at the borders the
    image is reflected, and every pixel counts (as torchmetrics has it, which published tokenizers are measured with).

    Args:
        x: uint8 (B, 3, R, R), R at least 11.
        y: likewise.

    Raises:
        ValueError: images with a side below 11 pixels.
    """
    if min(x.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"SSIM needs at least {MIN_SIDE} pixels per side, got {x.shape[-2]} x {x.shape[-1]}")
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds

    values = structural_similarity_index_measure(
        x.double() / 255, y.double() / 255, data_range=1.0, gaussian_kernel=True, sigma=1.5, reduction="none"
    )
    return values.reshape(len(x))
