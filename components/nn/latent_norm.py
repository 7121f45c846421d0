"""Batch norm on latents, so that the denoiser sees zero mean and unit variance while z changes."""

from __future__ import annotations

import torch
from torch import Tensor

from components.contracts.networks import Network  # not from components.contracts, which would be circular
from components.monitor.latent_statistics import observe
from components.nn.batch_norm import batch_norm
from components.nn.precision import at_least_fp32


class LatentNorm(Network):
    """Affine-free batch norm between tokenizer and denoiser (REPA-E, arXiv 2504.10483, section 3.2).

    Train and eval mode have no effect: the caller chooses the statistics. ``forward`` and ``invert`` use the running
    statistics without updating them; ``batch`` uses those of the batch over all ranks. Computes in at least fp32.

    Args:
        channels: latent channels C.
        positions: height and width (h, w), to normalize each channel of each position by its own statistics, (C, h, w),
            as RAE does (arXiv 2510.11690); None: statistics per channel, (C,).
        momentum: weight of a batch in the running statistics.
        eps: added to the variance.
        fixed: keep the statistics as they are, and normalize with them everywhere: without batch norm.
    """

    def __init__(
        self,
        channels: int,
        *,
        positions: tuple[int, int] | None = None,
        momentum: float = 0.1,
        eps: float = 1e-4,
        fixed: bool = False,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.fixed = fixed
        # Named as in nn.BatchNorm2d, because published checkpoints have this module as `bn`.
        self.register_buffer("running_mean", torch.empty(channels, *positions or ()))
        self.register_buffer("running_var", torch.empty(channels, *positions or ()))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long))
        self.init_weights()

    def init_weights(self) -> None:
        """Reset to zero mean, unit variance and no batches."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.num_batches_tracked.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """Normalize latents (B, C, h, w) with the running statistics."""
        observe(z)
        return (at_least_fp32(z) - _map(self.running_mean)) * torch.rsqrt(_map(self.running_var) + self.eps)

    def batch(self, z: Tensor, update: bool = True) -> Tensor:
        """Normalize latents (B, C, h, w) with batch statistics over all ranks, through which gradients flow.

        If ``fixed``, the same as ``forward``. Collective.

        Args:
            z: latents of this rank.
            update: update the running statistics (with the unbiased variance).
        """
        if self.fixed:
            return self(z)
        observe(z)
        if self.running_mean.ndim > 1:
            return self._batch(z.flatten(1), update).view(z.shape)  # each position of a channel as a channel
        return self._batch(z, update)

    def _batch(self, z: Tensor, update: bool) -> Tensor:
        if not update:
            return batch_norm(z, eps=self.eps)
        self.num_batches_tracked.add_(1)
        mean, var = self.running_mean.flatten(), self.running_var.flatten()  # views, which are updated in place
        return batch_norm(z, mean, var, momentum=self.momentum, eps=self.eps)

    def invert(self, z_normalized: Tensor) -> Tensor:
        """Inverse of ``forward``: maps normalized latents (B, C, h, w) back to the tokenizer's scale."""
        return at_least_fp32(z_normalized) * torch.sqrt(_map(self.running_var) + self.eps) + _map(self.running_mean)

    def summary(self) -> dict[str, Tensor]:
        """Scalar summaries of the running statistics over channels."""
        mean, var = self.running_mean, self.running_var
        low, high = torch.aminmax(var)
        return {
            "mean": mean.mean(),
            "mean_abs_max": mean.abs().amax(),
            "variance_mean": var.mean(),
            "variance_min": low,
            "variance_max": high,
        }

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the running statistics.

        Args:
            mean: C values, of any shape; or, for statistics per position, (C, h, w).
            std: as many positive values.

        Raises:
            ValueError: values of another channel count or resolution, or per position where the norm is per channel; a
                value that is not finite, or a standard deviation that is not positive.
        """
        mean, std = self._fitting(mean, "means"), self._fitting(std, "standard deviations")
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError("latent statistics: means must be finite and standard deviations finite and positive")
        self.running_mean.copy_(mean)
        self.running_var.copy_(std.square())

    def _fitting(self, values: Tensor, name: str) -> Tensor:
        """Values in a shape that broadcasts to the running statistics'."""
        shape, channels = self.running_mean.shape, len(self.running_mean)
        if values.numel() == channels:
            return values.reshape(channels, *[1] * (len(shape) - 1))
        if values.shape[-3:] == shape and values.numel() == shape.numel():
            return values.reshape(shape)
        got = f"latent statistics: expected {channels} {name}, one per latent channel"
        if len(shape) > 1:
            got += f", or {tuple(shape)} of them, one per channel and position of this resolution"
        got += f"; got {tuple(values.shape)}"
        if len(shape) == 1 and values.ndim >= 3 and values.shape[-3] == channels:
            got += ": one per position, for latent_norm.per_position = true"
        raise ValueError(got)


def _map(value: Tensor) -> Tensor:
    """Reshape (C,) to (C, 1, 1) to broadcast over positions."""
    return value[:, None, None] if value.ndim == 1 else value
