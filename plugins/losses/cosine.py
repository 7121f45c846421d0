"""Alignment by cosine similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.nn.alignment_heads import ConvHead, MLPHead
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("cosine")
class Cosine:
    """Negative cosine between projected denoiser tokens and encoder tokens (REPA, iREPA, HASTE).

    As REPA (arXiv 2410.06940) by default. iREPA (arXiv 2512.10794): ``head = "conv"``, ``spatial_norm = true``. HASTE
    (arXiv 2505.16792) without its attention loss: ``schedule = "stop"``.

    Args:
        tokenizer_weight: weight in the tokenizer's loss.
        denoiser_weight: weight in the denoiser's loss.
        head: mlp: three layers on each token; conv: one 3 x 3 convolution over the grid of tokens.
        head_width: features of the two inner layers of an MLP head.
        spatial_norm: normalise each feature of the targets over the tokens of the image.
        gamma: part of the tokens' mean that spatial_norm subtracts, in [0, 1].
        schedule: weights over the steps: constant; stop: full, then none from stop_step on; cosine: down to none at
            stop_step.
        stop_step: step, counted from 0, from which there is no alignment, for the schedules stop and cosine.

    Raises:
        ValueError: no features; gamma out of range; stop_step without such a schedule, or the schedule without it.
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
            raise ValueError(f"gamma = {gamma}: expected a part of the mean, in [0, 1]")
        if (schedule == "constant") != (stop_step == 0) or stop_step < 0:
            raise ValueError(
                f"schedule = '{schedule}' with stop_step = {stop_step}: the schedules 'stop' and 'cosine' need a "
                "stop_step of at least 1, 'constant' takes none"
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
        """One head per entry of ``embed_dims``: (B, N, width) -> (B, N, D_k)."""
        if self.head == "conv":
            return nn.ModuleList(ConvHead(width, embed_dim) for embed_dim in embed_dims)
        return nn.ModuleList(MLPHead(width, self.head_width, embed_dim) for embed_dim in embed_dims)

    def strength(self, step: int) -> float:
        """Factor of both weights at a step, counted from 0: exactly 0 from ``stop_step`` on."""
        if self.schedule == "constant":
            return 1.0
        if step >= self.stop_step:
            return 0.0
        return 1.0 if self.schedule == "stop" else 0.5 * (1 + math.cos(math.pi * step / self.stop_step))

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Mean of -cos over pairs, batch and tokens: a scalar in [-1, 1].

        Raises:
            ValueError: another number of projections than targets, or shapes that differ.
        """
        shapes = [tuple(p.shape) for p in projected], [tuple(y.shape) for y in targets]
        if shapes[0] != shapes[1]:
            raise ValueError(f"alignment: projected tokens {shapes[0]} and encoder tokens {shapes[1]} must match")
        if self.spatial_norm:
            targets = [spatially_normalised(y, self.gamma) for y in targets]
        cosines = [(_unit(p) * _unit(y)).sum(-1).mean() for p, y in zip(projected, targets)]
        return -torch.stack(cosines).mean()


def spatially_normalised(tokens: Tensor, gamma: float) -> Tensor:
    """(y - gamma mean(y)) / (std(y) + 1e-6), mean and (unbiased) std over the tokens of an image, for each feature.

    What all tokens of an image share goes, and with it most of what tells images apart as wholes (iREPA).

    Args:
        tokens: (B, N, D), N > 1.
    """
    tokens = at_least_fp32(tokens)
    std, mean = torch.std_mean(tokens, dim=1, keepdim=True)
    return (tokens - gamma * mean) / (std + 1e-6)


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(tokens), dim=-1, eps=1e-12)
