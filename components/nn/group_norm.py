"""Group norm with the values of PyTorch's, and faster paths for bf16 on CPUs and for compiled code on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from components.nn.precision import at_least_fp32


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` for maps (B, C, h, w): same arguments, state-dict keys and values; faster in two cases.

    - Compiled for a GPU, :class:`FromChannels` replaces it: a residual block moves half the bytes.
    - In bf16 and channels-last layout on a CPU, the backward pass is a few fp32 kernels. It takes a quarter to a half
      of the time of PyTorch's and rounds less. It is not differentiable itself.

    Attributes:
        fast: False: always as ``nn.GroupNorm``; for all instances if set on the class.
        silu: whether SiLU follows.
    """

    fast = True
    silu = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        if self.fast and self.affine:
            if torch.compiler.is_compiling():
                if x.device.type == "cuda":
                    return FromChannels.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)
            elif x.dtype is torch.bfloat16 and x.device.type == "cpu" and _is_channels_last(x):
                y = _ChannelsLastBF16.apply(x, self.weight, self.bias, self.num_groups, self.eps)
                return F.silu(y) if self.silu else y
        y = super().forward(x)
        return F.silu(y) if self.silu else y


class GroupNormSiLU(GroupNorm):
    """Group norm followed by SiLU; see :class:`GroupNorm`."""

    silu = True


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class FromChannels(torch.autograd.Function):
    """Group norm, then SiLU if wanted, written for Inductor: statistics of groups are merged from those of channels.

    Inductor then fuses the reductions in channels-last layout, too. The backward pass is written out so that the
    gradient before SiLU is computed again where it is needed, and not stored in fp32. It is not differentiable itself.

    Takes x (B, C, h, w) of any floating dtype, weight and bias (C,), the number of groups, eps, and whether SiLU
    follows; returns (B, C, h, w) in at least fp32, as CUDA's autocast does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        wide = at_least_fp32(x)
        var, mean = torch.var_mean(wide, dim=(2, 3), correction=0)
        var, mean = (value.unflatten(1, (groups, -1)) for value in (var, mean))
        group_mean = mean.mean(2, keepdim=True)
        # Of equally many values each: the mean of the variances plus the variance of the means.
        rstd = ((var + (mean - group_mean).square()).mean(2, keepdim=True) + eps).rsqrt()
        scale = weight * rstd.expand_as(var).flatten(1)
        shift = bias - scale * group_mean.expand_as(mean).flatten(1)
        ctx.save_for_backward(x, weight, group_mean, rstd, scale, shift)
        ctx.silu = silu
        y = wide * scale[:, :, None, None] + shift[:, :, None, None]
        return F.silu(y) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, scale, shift = ctx.saved_tensors
        wide, grad = at_least_fp32(x), at_least_fp32(grad)
        if ctx.silu:
            y = wide * scale[:, :, None, None] + shift[:, :, None, None]
            gate = y.sigmoid()
            grad = grad * gate * (1 + y * (1 - gate))
        groups, values = mean.shape[1], x[0].numel() // mean.shape[1]
        total, product = (v.unflatten(1, (groups, -1)) for v in (grad.sum((2, 3)), (grad * wide).sum((2, 3))))
        product = (product - total * mean) * rstd  # sum of grad times the normalized x
        dweight, dbias = product.sum(0).flatten(), total.sum(0).flatten()
        # dx = scale * grad + slope * x + offset, where slope and offset differ between groups.
        total, product = ((v * weight.view(groups, -1)).sum(2, keepdim=True) / values for v in (total, product))
        slope = -rstd.square() * product
        offset = -slope * mean - rstd * total
        slope, offset = (v.expand(-1, -1, len(weight) // groups).flatten(1)[:, :, None, None] for v in (slope, offset))
        dx = scale[:, :, None, None] * grad + slope * wide + offset
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


class _ChannelsLastBF16(torch.autograd.Function):
    """Group norm of bf16 maps in channels-last layout on a CPU; only the backward pass is not PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, h, w = x.shape
        y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        by_group = (-1, ctx.groups, c // ctx.groups)  # per channel: (n or 1, groups, channels of a group)
        x_wide, dx = x.float(), grad.float()
        total, product = dx.sum((2, 3)).view(by_group), (dx * x_wide).sum((2, 3)).view(by_group)
        scale, mean, rstd = weight.float().view(by_group), mean.float()[:, :, None], rstd.float()[:, :, None]
        dweight, dbias = ((product - total * mean) * rstd).sum(0), total.sum(0)
        # dx = a * grad + b * x + shift, where a differs between channels, b and shift between groups.
        total, product = ((value * scale).sum(2, keepdim=True) for value in (total, product))
        b = (total * mean - product) * rstd**3 / (by_group[2] * h * w)
        shift = -b * mean - total * rstd / (by_group[2] * h * w)
        a, b, shift = (value.expand(n, *by_group[1:]).reshape(n, c, 1, 1) for value in (scale * rstd, b, shift))
        dx = dx.mul_(a).addcmul_(x_wide, b).add_(shift).to(x.dtype)
        return dx, dweight.view(-1).to(weight.dtype), dbias.view(-1).to(weight.dtype), None, None
