"""Describe the plugin and cite its source here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import AlignmentLoss
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("template")
class Template(AlignmentLoss):
    """Mean squared error of layer-normalized tokens, with linear heads. Replace the loss and this line.

    Args:
        tokenizer_weight: weight in the tokenizer's loss.
        denoiser_weight: weight in the denoiser's loss.
    """

    def __init__(self, *, tokenizer_weight: float = 1.5, denoiser_weight: float = 0.5) -> None:
        self.tokenizer_weight = tokenizer_weight
        self.denoiser_weight = denoiser_weight

    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        """Create one trainable head per entry of ``embed_dims``: (B, grid * grid, width) -> (B, grid * grid, D_k)."""
        return nn.ModuleList(nn.Linear(width, dim) for dim in embed_dims)

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Pairs of projected tokens and targets (B, N, D_k) -> scalar in at least fp32, the mean over pairs."""
        errors = []
        for tokens, target in zip(projected, targets):
            x, y = (F.layer_norm(at_least_fp32(value), value.shape[-1:]) for value in (tokens, target))
            errors.append((x - y).square().mean())
        return torch.stack(errors).mean()
