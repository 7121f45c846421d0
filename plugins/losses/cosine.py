"""Cosine-similarity alignment loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import AlignmentLoss
from components.nn.alignment_heads import ConvHead, MLPHead
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("cosine")
class Cosine(AlignmentLoss):
    """Negative cosine similarity between projected denoiser tokens and encoder tokens (REPA, iREPA, HASTE).

    The defaults are those of REPA (arXiv 2410.06940). For iREPA (arXiv 2512.10794), set ``head = "conv"`` and
    ``spatial_norm = true``; for HASTE (arXiv 2505.16792) without its attention loss, set ``schedule = "stop"``.

    Args:
        tokenizer_weight: weight in the tokenizer's loss.
        denoiser_weight: weight in the denoiser's loss.
        head: mlp: three-layer MLP per token; conv: one 3 x 3 convolution over the token grid.
        head_width: features of the two hidden layers of an MLP head.
        spatial_norm: normalize each feature of the targets over the tokens of its image.
        gamma: fraction of the tokens' mean that spatial_norm subtracts, in [0, 1].
        schedule: scale of both weights over training: constant; stop: 1, then 0 from stop_step; cosine: decay from 1
            to 0 at stop_step.
        stop_step: first step (counted from 0) without alignment; required by the schedules stop and cosine.

    Raises:
        ValueError: ``head_width`` is below 1, ``gamma`` is out of range, or ``schedule`` and ``stop_step`` do not fit
            each other.
    """

    def __init__(
        self,
        *,
        tokenizer_weight: float = 1.5,
        denoiser_weight: float = 0.5,
        head: Literal["mlp", "conv"] = "mlp",
        head_width: int = 2048,
        spatial_norm: bool = False,
        gamma: float = 0.6,
        schedule: Literal["constant", "stop", "cosine"] = "constant",
        stop_step: int = 0,
    ) -> None:
        if head_width < 1:
            raise ValueError(f"head_width = {head_width}: expected at least 1 feature")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma = {gamma}: expected a fraction of the mean, in [0, 1]")
        if (schedule == "constant") != (stop_step == 0) or stop_step < 0:
            raise ValueError(
                f"schedule = '{schedule}' with stop_step = {stop_step}: the schedules 'stop' and 'cosine' require a "
                "stop_step of at least 1; 'constant' does not use it"
            )
        self.tokenizer_weight = tokenizer_weight
        self.denoiser_weight = denoiser_weight
        self.head = head
        self.head_width = head_width
        self.spatial_norm = spatial_norm
        self.gamma = gamma
        self.schedule = schedule
        self.stop_step = stop_step

    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        """Create one projection head per entry of ``embed_dims``: (B, N, width) -> (B, N, D_k)."""
        if self.head == "conv":
            return nn.ModuleList(ConvHead(width, embed_dim) for embed_dim in embed_dims)
        return nn.ModuleList(MLPHead(width, self.head_width, embed_dim) for embed_dim in embed_dims)

    def strength(self, step: int) -> float:
        """Return the factor of both weights at ``step`` (counted from 0); exactly 0 from ``stop_step`` on."""
        if self.schedule == "constant":
            return 1.0
        if step >= self.stop_step:
            return 0.0
        return 1.0 if self.schedule == "stop" else 0.5 * (1 + math.cos(math.pi * step / self.stop_step))

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the mean of -cos over pairs, batch and tokens: a scalar in [-1, 1].

        Raises:
            ValueError: the number or the shapes of projections and targets differ.
        """
        shapes = [tuple(p.shape) for p in projected], [tuple(y.shape) for y in targets]
        if shapes[0] != shapes[1]:
            raise ValueError(f"alignment: projected tokens {shapes[0]} and encoder tokens {shapes[1]} must match")
        if self.spatial_norm:
            targets = [spatially_normalized(y, self.gamma) for y in targets]
        cosines = [(_unit(p) * _unit(y)).sum(-1).mean() for p, y in zip(projected, targets)]
        return -torch.stack(cosines).mean()


def spatially_normalized(tokens: Tensor, gamma: float) -> Tensor:
    """Normalize each feature over an image's tokens: (y - gamma mean(y)) / (std(y) + 1e-6), with the unbiased std.

    This removes the component shared by all tokens of an image, and with it most global image information (iREPA).

    Args:
        tokens: (B, N, D), N > 1.
    """
    tokens = at_least_fp32(tokens)
    std, mean = torch.std_mean(tokens, dim=1, keepdim=True)
    return (tokens - gamma * mean) / (std + 1e-6)


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(tokens), dim=-1, eps=1e-12)
