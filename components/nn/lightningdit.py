"""LightningDiT's blocks (arXiv 2501.01423), which DiT-DH (arXiv 2510.11690) is made of, too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.nn.precision import at_least_fp32


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in at least fp32."""

    EPS = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.EPS).rsqrt()
        # Under autocast the weight is fp32, and what follows stays so until the next product.
        return (wide * self.weight).to(torch.promote_types(x.dtype, self.weight.dtype))


class Rotary(nn.Module):
    """Rotary positions on a grid: the first half of a head's features turns with the row, the second with the column.

    Pairs of neighbouring features turn by position / 10_000^(2 i / (d / 2)), i in [0, d / 4) (RoFormer,
    arXiv 2104.09864; in two dimensions as EVA-02, arXiv 2303.11331). The tables are persistent: published weights
    carry theirs.
    """

    def __init__(self, head_dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("freqs_cos", torch.empty(grid * grid, head_dim))
        self.register_buffer("freqs_sin", torch.empty(grid * grid, head_dim))

    def init_weights(self) -> None:
        """Fills both tables."""
        if self.freqs_cos.is_meta:
            return
        half = self.freqs_cos.shape[1] // 2
        frequency = 10_000 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        axis = (torch.arange(self.grid, dtype=torch.float64)[:, None] * frequency).repeat_interleave(2, dim=1)
        rows, columns = axis.repeat_interleave(self.grid, dim=0), axis.repeat(self.grid, 1)
        angle = torch.cat([rows, columns], dim=1)
        self.freqs_cos.copy_(angle.cos())
        self.freqs_sin.copy_(angle.sin())

    def forward(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, head_dim) for :func:`rotate`."""
        return self.freqs_cos, self.freqs_sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of features of x (..., N, d) by the angles of ``cos`` and ``sin`` (N, d)."""
    x = at_least_fp32(x)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


class RotaryAttention(nn.Module):
    """Self-attention with rotary positions; ``qk_norm``: RMS norm on queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP: w3(silu(a) * b) with a, b the halves of w12(x) (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LightningBlock(nn.Module):
    """Block of LightningDiT (arXiv 2501.01423): RMS norms, rotary attention and SwiGLU under adaLN-Zero.

    The SwiGLU has 2 / 3 of ``mlp_ratio`` * width hidden features, as many weights as a plain MLP.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width, heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(width * mlp_ratio) * 2 // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, width); c (B, 1, width), or (B, N, width) for a condition of each token's own."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class LightningFinalLayer(nn.Module):
    """RMS norm under adaLN, then linear to ``out_features``."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x and c as in :class:`LightningBlock`."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def init_lightning(blocks: Iterable[nn.Module], final: LightningFinalLayer) -> None:
    """Zero modulation and output, so that a new block is the identity; norms of ones."""
    for module in (*blocks, final):
        nn.init.zeros_(module.adaLN_modulation[-1].weight)
        nn.init.zeros_(module.adaLN_modulation[-1].bias)
        for norm in module.modules():
            if isinstance(norm, RMSNorm):
                nn.init.ones_(norm.weight)
    nn.init.zeros_(final.linear.weight)
    nn.init.zeros_(final.linear.bias)


def check_rotary(key: str, width: int, heads: int) -> None:
    """Raises ValueError unless the heads divide the width into multiples of 4 features."""
    if width < 4 or heads < 1 or width % heads or width // heads % 4:
        raise ValueError(
            f"denoiser.{key}width = {width} with denoiser.{key}heads = {heads}: each head needs a multiple of 4 "
            "features (rotary positions in two dimensions)"
        )
