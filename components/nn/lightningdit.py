"""Blocks of LightningDiT (arXiv 2501.01423), also used by DiT-DH (arXiv 2510.11690)."""

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
        # Under autocast the weight is fp32, so the result is fp32 until the next matrix product.
        return (wide * self.weight).to(torch.promote_types(x.dtype, self.weight.dtype))


class Rotary(nn.Module):
    """2-D rotary position embedding: rotates the first half of a head's features by row, the second by column.

    Pairs of adjacent features rotate by position / 10_000^(2 i / (d / 2)), where d is the head dimension and i in
    [0, d / 4) (RoFormer, arXiv 2104.09864; in 2-D as in EVA-02, arXiv 2303.11331). The tables are persistent buffers
    because published weights contain them.
    """

    def __init__(self, head_dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("freqs_cos", torch.empty(grid * grid, head_dim))
        self.register_buffer("freqs_sin", torch.empty(grid * grid, head_dim))

    def init_weights(self) -> None:
        """Compute both tables."""
        if self.freqs_cos.is_meta:
            return
        half = self.freqs_cos.shape[1] // 2
        frequency = 10_000 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        axis = (torch.arange(self.grid, dtype=torch.float64)[:, None] * frequency).repeat_interleave(2, dim=1)
        rows, columns = axis.repeat_interleave(self.grid, dim=0), axis.repeat(self.grid, 1)
        angle = torch.cat([rows, columns], dim=1)
        self.freqs_cos.copy_(angle.cos())
        self.freqs_sin.copy_(angle.sin())

    def forward(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines (first + N, head_dim) for :func:`rotate`; it does not rotate the ``first`` tokens."""
        if not first:
            return self.freqs_cos, self.freqs_sin
        return F.pad(self.freqs_cos, (0, 0, first, 0), value=1.0), F.pad(self.freqs_sin, (0, 0, first, 0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of features of x (..., N, d) by the angles given as ``cos`` and ``sin`` (N, d)."""
    x = at_least_fp32(x)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


class RotaryAttention(nn.Module):
    """Self-attention with rotary positions; ``qk_norm`` applies RMSNorm to queries and keys.

    ``fused``: one matrix for queries, keys and values, or three, which Muon then updates separately.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.fused:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP: w3(silu(a) * b), where a and b are the halves of w12(x) (arXiv 2002.05202).

    Without ``fused``, a = w1(x) and b = w2(x).
    """

    def __init__(self, width: int, hidden: int, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.w12 = nn.Linear(width, 2 * hidden)
        else:
            self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1) if self.fused else (self.w1(x), self.w2(x))
        return self.w3(F.silu(a) * b)


class PlainBlock(nn.Module):
    """Pre-norm block with RMSNorm, rotary attention and SwiGLU, without modulation.

    The SwiGLU has 2 / 3 * ``mlp_ratio`` * width hidden features, so it has as many weights as a plain MLP.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, fused: bool = True) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width, heads, qk_norm, fused)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(width * mlp_ratio) * 2 // 3, fused)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the block to tokens x (B, N, width)."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class LightningBlock(PlainBlock):
    """LightningDiT block (arXiv 2501.01423): the plain block, modulated by adaLN-Zero."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, fused: bool = True) -> None:
        super().__init__(width, heads, mlp_ratio, qk_norm, fused)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the block to tokens x (B, N, width), conditioned on c: (B, 1, width), or (B, N, width) per token."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class LightningFinalLayer(nn.Module):
    """RMSNorm with adaLN modulation, then a linear layer to ``out_features``."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map x to (B, N, out_features); x and c as in :class:`LightningBlock`."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def init_lightning(blocks: Iterable[nn.Module], *finals: LightningFinalLayer) -> None:
    """Zero-initialize modulation and output layers; norm weights become 1. Modulated blocks start as the identity."""
    for module in (*blocks, *finals):
        if isinstance(module, (LightningBlock, LightningFinalLayer)):
            nn.init.zeros_(module.adaLN_modulation[-1].weight)
            nn.init.zeros_(module.adaLN_modulation[-1].bias)
        for norm in module.modules():
            if isinstance(norm, RMSNorm):
                nn.init.ones_(norm.weight)
    for final in finals:
        nn.init.zeros_(final.linear.weight)
        nn.init.zeros_(final.linear.bias)


def check_rotary(key: str, width: int, heads: int) -> None:
    """Raise ValueError unless the head dimension, width / heads, is a multiple of 4."""
    if width < 4 or heads < 1 or width % heads or width // heads % 4:
        raise ValueError(
            f"denoiser.{key}width = {width} with denoiser.{key}heads = {heads}: each head needs a multiple of 4 "
            "features (2-D rotary position embedding)"
        )
