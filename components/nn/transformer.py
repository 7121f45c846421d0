"""Parts that diffusion transformers share: embeddings of patches, times and positions, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from components.contracts import LatentShape, Tokens
from components.nn.precision import at_least_fp32


class PatchEmbedding(nn.Module):
    """(B, C, h, w) -> (B, N, width), rows first."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def init_weights(self) -> None:
        """As a linear layer on the patch: Xavier-uniform."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Sums keep the layout of their first term: without a copy here every block would work on transposed tokens.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimeEmbedding(nn.Module):
    """256 sinusoids of t, then an MLP to (B, width)."""

    FREQUENCIES, MAX_PERIOD = 256, 10_000

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        # At least float32 whatever the network's dtype: bf16 cannot tell t = 0.999 from 1.
        half = self.FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) * -math.log(self.MAX_PERIOD) / half
        angles = at_least_fp32(t)[:, None] * exponent.exp()[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding (1, grid * grid, width), rows first: columns' half, then rows' half (MAE)."""
    frequency = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency[None]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = axis[None].expand(grid, -1, -1)
    rows = axis[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width).float()


def unpatchify(x: Tensor, channels: int) -> Tensor:
    """Tokens (B, n * n, p * p * C), channels fastest -> (B, C, n * p, n * p)."""
    n, p = math.isqrt(x.shape[1]), math.isqrt(x.shape[2] // channels)
    x = x.view(-1, n, n, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, n * p, n * p)


def check_patches(name: str, latent: LatentShape, patch_size: int) -> None:
    """Raises ValueError unless the latent of the denoiser ``name`` is square and divides into patches."""
    if latent.height != latent.width:
        raise ValueError(f"denoiser.name = '{name}' takes square latents; got {latent.height} x {latent.width}")
    if patch_size < 1 or latent.height % patch_size:
        raise ValueError(
            f"denoiser.patch_size = {patch_size} does not divide the latent's side of {latent.height}; "
            f"allowed: {', '.join(str(p) for p in range(1, latent.height + 1) if latent.height % p == 0)}"
        )


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, *condition: Tensor, align_depth: int | Sequence[int]
) -> tuple[Tensor, Tokens]:
    """x behind all blocks, and behind those that ``align_depth`` names, counted from 1: a tuple for a list of them."""
    depths = [align_depth] if isinstance(align_depth, int) else align_depth
    taken = []
    for depth, block in enumerate(blocks, 1):
        x = block(x, *condition)
        if depth in depths:
            taken.append(x)
    return x, taken[0] if isinstance(align_depth, int) else tuple(taken)


def last_depth(align_depth: int | Sequence[int]) -> int:
    """The deepest block that ``align_depth`` names."""
    return align_depth if isinstance(align_depth, int) else align_depth[-1]


def check_blocks(depth: int, align_depth: int | Sequence[int], label_dropout: float) -> None:
    """Raises ValueError for a depth, an alignment depth or a probability out of range."""
    if depth < 1:
        raise ValueError(f"denoiser.depth = {depth}: expected at least 1 block")
    depths = [align_depth] if isinstance(align_depth, int) else list(align_depth)
    if not depths or depths != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] <= depth:
        raise ValueError(
            f"denoiser.align_depth = {align_depth}: expected 1 to {depth} (the denoiser's depth), or a rising list"
        )
    if not 0 <= label_dropout < 1:
        raise ValueError(f"denoiser.label_dropout = {label_dropout}: expected a probability in [0, 1)")
