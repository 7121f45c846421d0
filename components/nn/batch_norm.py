"""Batch norm whose statistics cover every rank: on CPU and GPU, under gloo and NCCL, differentiable.

With one rank it is ``F.batch_norm``. With several, two reductions: first the mean, then the second moment
about it. One reduction of (sum, sum of squares) would be cheaper, but subtracts two large numbers where the
mean is large against the deviation.
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
    """Per channel over batch and positions: ``mean`` (C,), biased ``var`` (C,); ``count`` () of values."""

    mean: Tensor
    var: Tensor
    count: Tensor


_alone = False


def world_size() -> int:
    """Ranks that share a batch; 1 outside ``torch.distributed``, and inside :func:`alone`."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, a batch is this rank's alone: nothing waits for other ranks, which may be elsewhere."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def batch_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean per channel over a batch, its positions and all ranks.

    Ranks may hold batches of different sizes. Differentiable: the gradient is that of the sum of all ranks'
    losses, which data parallelism then averages.

    Args:
        x: (B, C, ...) of any floating dtype.

    Returns:
        The mean (C,) and the number of values behind it (), both in at least fp32.
    """
    x = at_least_fp32(x)
    dims = _all_but_channels(x)
    local_count = x.new_full((1,), x.numel() // x.shape[1])
    total = _sum_over_ranks(torch.cat([x.sum(dims), local_count]))
    count = total[-1].detach()
    return total[:-1] / count, count


def batch_stats(x: Tensor) -> BatchStats:
    """Mean and biased variance per channel over a batch, its positions and all ranks.

    Args:
        x: (B, C, ...) of any floating dtype.

    Returns:
        Statistics in at least fp32; differentiable as :func:`batch_mean`.
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
    """``F.batch_norm(training=True)`` with the statistics of all ranks.

    Args:
        x: (B, C, ...) of any floating dtype.
        running_mean: (C,), moved in place towards the batch's mean by ``momentum``; None leaves it out.
        running_var: (C,), likewise towards the batch's unbiased variance.
        weight: (C,) factor of the normalised values.
        bias: (C,) added last.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        (B, C, ...) in at least fp32.

    Raises:
        ValueError: one rank with a single value per channel, which has no variance.
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
    """``nn.BatchNorm2d`` with the statistics of all ranks, and of the batch in eval mode, too.

    The running statistics are kept (same state-dict keys as ``nn.BatchNorm2d``) but never used to normalise:
    a discriminator's batch norm belongs to the batch that it judges, whatever mode the module was left in.
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
    # The result waits lazily, and views of it stay lazy; a copy is an ordinary tensor.
    return collectives.all_reduce(value, "sum", dist.group.WORLD).clone()
