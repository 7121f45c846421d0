"""Statistics and visualization of a step's latents, computed on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from components.nn.precision import at_least_fp32

_current: list[Tensor] | None = None


def observe(z: Tensor) -> None:
    """Record latents (B, C, h, w) inside :func:`observed`, only the first per micro-batch; elsewhere a no-op."""
    if _current is not None and not _current:
        _current.append(z.detach())


@contextlib.contextmanager
def observed() -> Iterator[list[Tensor]]:
    """Context manager that collects the first observed latents: a list, empty or of one tensor (B, C, h, w)."""
    global _current
    before, _current = _current, []
    try:
        yield _current
    finally:
        _current = before


@torch.no_grad()
def statistics(z: Tensor) -> dict[str, Tensor]:
    """Scalars that show whether latents collapse, as means over images, so ranks and micro-batches may be averaged.

    Args:
        z: (B, C, h, w).

    Returns:
        mean: over all elements.
        spatial_variance: biased variance over the h * w positions of each image and channel, averaged over channels and
            images. REPA-E (arXiv 2504.10483) reports it: backpropagating the diffusion loss into the VAE reduces it
            from 17 to 0.02.
        total_variation: mean absolute difference of neighboring positions, averaged over both directions. Compared with
            the square root of the spatial variance, it is large for noisy latents and small for smooth ones.
    """
    z = at_least_fp32(z)
    down, right = (z[..., 1:, :] - z[..., :-1, :]).abs().mean(), (z[..., 1:] - z[..., :-1]).abs().mean()
    return {
        "mean": z.mean(),
        "spatial_variance": z.var((-2, -1), correction=0).mean(),
        "total_variation": 0.5 * (down + right),
    }


@torch.no_grad()
def principal_components(z: Tensor) -> Tensor:
    """RGB images of latents: their first three principal components over all positions of all images.

    Red is the component with the largest variance. Each component's sign is chosen for positive skewness, and its 1st
    to 99th percentiles map to [0, 1]. The result is invariant to rotations of the channels of ``z``.

    Args:
        z: (B, C, h, w).

    Returns:
        (B, 3, h, w) float32 in [0, 1], comparable between the images of a call; 0.5 for missing components.
    """
    batch, channels, height, width = z.shape
    rows = z.double().nan_to_num().permute(0, 2, 3, 1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # in ascending order of variance
    projected = rows @ vectors.flip(1)[:, :3]
    projected = projected * torch.where((projected**3).sum(0) < 0, -1.0, 1.0)
    low, high = projected.quantile(0.01, dim=0), projected.quantile(0.99, dim=0)
    spread = high - low
    scaled = ((projected - low) / spread.clamp_min(torch.finfo(spread.dtype).tiny)).clamp(0, 1)
    # Fewer than three components, or variance from rounding only.
    scaled = torch.where(spread > 1e-6 * spread.max(), scaled, 0.5)
    colors = torch.full((len(rows), 3), 0.5, dtype=torch.float64, device=z.device)
    colors[:, : scaled.shape[1]] = scaled
    return colors.reshape(batch, height, width, 3).permute(0, 3, 1, 2).float()
