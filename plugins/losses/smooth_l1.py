"""Smooth L1 alignment loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import AlignmentLoss, Network
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("smooth_l1")
class SmoothL1(AlignmentLoss):
    """Smooth L1 distance between projected denoiser tokens and target tokens (SRA, arXiv 2505.02831).

    Unlike the cosine, it depends on the tokens' norms. The defaults are those of SRA's published code.

    Args:
        tokenizer_weight: weight in the tokenizer's loss.
        denoiser_weight: weight in the denoiser's loss.
        beta: difference below which the loss is quadratic instead of linear.

    Raises:
        ValueError: ``beta`` is not positive.
    """

    def __init__(self, *, tokenizer_weight: float = 0.2, denoiser_weight: float = 0.2, beta: float = 0.05) -> None:
        if beta <= 0:
            raise ValueError(f"beta = {beta}: expected a positive difference")
        self.tokenizer_weight = tokenizer_weight
        self.denoiser_weight = denoiser_weight
        self.beta = beta

    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        """Create one projection head per entry of ``embed_dims``: (B, N, width) -> (B, N, D_k)."""
        return nn.ModuleList(TwoLayerHead(width, embed_dim) for embed_dim in embed_dims)

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the mean over pairs, batch, tokens and features: a scalar >= 0.

        Raises:
            ValueError: the number or the shapes of projections and targets differ.
        """
        shapes = [tuple(p.shape) for p in projected], [tuple(y.shape) for y in targets]
        if shapes[0] != shapes[1]:
            raise ValueError(f"alignment: projected tokens {shapes[0]} and target tokens {shapes[1]} must match")
        pairs = [(at_least_fp32(p), at_least_fp32(y)) for p, y in zip(projected, targets)]
        return torch.stack([F.smooth_l1_loss(p, y, beta=self.beta) for p, y in pairs]).mean()


class TwoLayerHead(Network):
    """Two linear layers with SiLU between them; maps tokens (B, N, width) to (B, N, embed_dim).

    State-dict keys match the published ``ap_head``: ``weight`` and ``bias`` of ``linear1`` and ``linear2``.
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width + embed_dim)
        self.linear2 = nn.Linear(width + embed_dim, embed_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.linear2(F.silu(self.linear1(tokens)))
        return out
