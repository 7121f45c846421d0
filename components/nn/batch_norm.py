"""Differentiable batch norm with statistics over all ranks, on CPU and GPU, with gloo and NCCL.

With one rank it is ``F.batch_norm``. With several it uses two all-reduces: one for the mean, one for the second central
moment. A single all-reduce of (sum, sum of squares) would be cheaper, but suffers cancellation if the mean is large
compared with the standard deviation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from components.nn.precision import at_least_fp32


class BatchStats(NamedTuple):
    """Statistics over batch and positions: ``mean`` (C,), biased ``var`` (C,), and ``count`` () values per channel."""

    mean: Tensor
    var: Tensor
    count: Tensor


_alone = False


def world_size() -> int:
    """Number of ranks that share a batch; 1 without ``torch.distributed`` and inside :func:`alone`."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Context manager in which statistics cover this rank only, without communication."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def batch_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean per channel over batch, positions and all ranks.

    Batch sizes may differ between ranks. Differentiable: the gradient is that of the sum of all ranks' losses, which
    data parallelism then averages.

    Args:
        x: (B, C, ...) of any floating dtype.

    Returns:
        The mean (C,) and the number of values per channel (), both in at least fp32.
    """
    x = at_least_fp32(x)
    dims = _all_but_channels(x)
    local_count = x.new_full((1,), x.numel() // x.shape[1])
    total = _sum_over_ranks(torch.cat([x.sum(dims), local_count]))
    count = total[-1].detach()
    return total[:-1] / count, count


def batch_stats(x: Tensor) -> BatchStats:
    """Mean and biased variance per channel over batch, positions and all ranks.

    Args:
        x: (B, C, ...) of any floating dtype.

    Returns:
        Statistics in at least fp32; differentiable like :func:`batch_mean`.
    """
    x = at_least_fp32(x)
    mean, count = batch_mean(x)
    var = _sum_over_ranks((x - _per_channel(mean, x)).square().sum(_all_but_channels(x))) / count
    return BatchStats(mean, var, count)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm(training=True)`` with statistics over all ranks.

    Args:
        x: (B, C, ...) of any floating dtype.
        running_mean: (C,), updated in place with the batch mean; None: not tracked.
        running_var: (C,), updated in place with the unbiased batch variance; None: not tracked.
        weight: scale (C,), or None.
        bias: (C,), or None.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        (B, C, ...) in at least fp32.

    Raises:
        ValueError: there is one rank and only one value per channel, which has no variance.
    """
    x = at_least_fp32(x)
    if world_size() == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    mean, var, count = batch_stats(x)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    y = (x - _per_channel(mean, x)) * _per_channel(torch.rsqrt(var + eps), x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with batch statistics over all ranks, even in eval mode.

    Running statistics are tracked, with the state-dict keys of ``nn.BatchNorm2d``, but not used for normalization: a
    discriminator always normalizes with the batch that it classifies.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w) in at least fp32."""
        self.num_batches_tracked.add_(1)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.momentum, self.eps)


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (x.dim() - 2))


def _sum_over_ranks(value: Tensor) -> Tensor:
    if world_size() == 1:
        return value
    # The result is a lazy AsyncCollectiveTensor, and so are views of it; clone() returns an ordinary tensor.
    return collectives.all_reduce(value, "sum", dist.group.WORLD).clone()
