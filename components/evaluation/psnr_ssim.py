"""PSNR and SSIM of 8-bit images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SIDE = 11  # size of the SSIM window
K1, K2 = 0.01, 0.03


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; infinite for equal images.

    Args:
        x: uint8 (B, 3, R, R); the peak value is 255.
        y: like ``x``.
    """
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), (B,) float64, at most 1.

    Gaussian window of 11 pixels with sigma = 1.5, per color channel, K1 = 0.01, K2 = 0.03. Borders use reflection
    padding, and the mean is over all pixels, as in torchmetrics.

    Args:
        x: uint8 (B, 3, R, R), R at least 11.
        y: like ``x``.

    Raises:
        ValueError: a side is smaller than 11 pixels.
    """
    if min(x.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"SSIM needs at least {MIN_SIDE} pixels per side, got {x.shape[-2]} x {x.shape[-1]}")
    offsets = torch.arange(MIN_SIDE, dtype=torch.float64, device=x.device) - MIN_SIDE // 2
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, -1, 1)

    def smooth(planes: Tensor) -> Tensor:
        padded = F.pad(planes.flatten(0, 1)[:, None], (MIN_SIDE // 2,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, window), window.transpose(2, 3)).view_as(planes)

    a, b = x.double() / 255, y.double() / 255
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return (luminance * structure).flatten(1).mean(1)
