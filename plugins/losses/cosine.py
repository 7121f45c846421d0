"""Alignment by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.precision import at_least_fp32
from components.projector import MLPHead
from components.registry import losses


@losses.register("cosine")
class Cosine:
    """Negative cosine between projected denoiser tokens and encoder tokens (REPA, arXiv 2410.06940).

    Args:
        tokenizer_weight: weight in the tokenizer's loss.
        denoiser_weight: weight in the denoiser's loss.
        head_width: features of the two inner layers of a head.
    """

    def __init__(self, *, tokenizer_weight: float = 1.5, denoiser_weight: float = 0.5, head_width: int = 2048) -> None:
        self.tokenizer_weight = tokenizer_weight
        self.denoiser_weight = denoiser_weight
        self.head_width = head_width

    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        """One MLP per encoder: (B, N, width) -> (B, N, D_k)."""
        return nn.ModuleList(MLPHead(width, self.head_width, embed_dim) for embed_dim in embed_dims)

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Mean of -cos over encoders, batch and tokens: a scalar in [-1, 1].

        Raises:
            ValueError: another number of projections than targets, or shapes that differ.
        """
        shapes = [tuple(p.shape) for p in projected], [tuple(y.shape) for y in targets]
        if shapes[0] != shapes[1]:
            raise ValueError(f"alignment: projected tokens {shapes[0]} and encoder tokens {shapes[1]} must match")
        cosines = [(_unit(p) * _unit(y)).sum(-1).mean() for p, y in zip(projected, targets)]
        return -torch.stack(cosines).mean()


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(tokens), dim=-1, eps=1e-12)
