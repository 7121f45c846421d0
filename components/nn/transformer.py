"""Shared parts of diffusion transformers: patch, time and position embeddings, and checks of their options."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from components.contracts import LatentShape, Prediction, Tokens
from components.nn.precision import at_least_fp32

# Smallest divisor in the velocity of predicted data or noise (JiT, arXiv 2511.13720).
VELOCITY_FLOOR = 0.05


class PatchEmbedding(nn.Module):
    """Embeds patches of latents (B, C, h, w) as tokens (B, N, width) in row-major order."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def init_weights(self) -> None:
        """Xavier-uniform, as for a linear layer on flattened patches; zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Residual sums keep the memory format of their first term: without a copy, all blocks would get strided tokens.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class BottleneckPatchEmbedding(nn.Module):
    """Patch embedding through fewer features than a token's: linear to ``bottleneck``, then to ``width`` (JiT)."""

    def __init__(self, channels: int, patch_size: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, 1)

    def init_weights(self) -> None:
        """Xavier-uniform, as for linear layers; zero bias."""
        for layer in (self.proj1, self.proj2):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
        nn.init.zeros_(self.proj2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2).contiguous()  # as in PatchEmbedding


class TimeEmbedding(nn.Module):
    """Embeds times t (B,) as (B, width): 256 sinusoids followed by an MLP."""

    FREQUENCIES, MAX_PERIOD = 256, 10_000

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        # In at least fp32, whatever the network's dtype: in bf16, t = 0.999 rounds to 1.
        half = self.FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) * -math.log(self.MAX_PERIOD) / half
        angles = at_least_fp32(t)[:, None] * exponent.exp()[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (1, grid * grid, width), row-major: column half, then row half (MAE)."""
    frequency = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency[None]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = axis[None].expand(grid, -1, -1)
    rows = axis[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width).float()


def unpatchify(x: Tensor, channels: int) -> Tensor:
    """Map tokens (B, n * n, p * p * C), channels last within a patch, to (B, C, n * p, n * p)."""
    n, p = math.isqrt(x.shape[1]), math.isqrt(x.shape[2] // channels)
    x = x.view(-1, n, n, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, n * p, n * p)


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """Convert what a network predicts to the velocity v = e - x of the linear path x_t = (1 - t) x + t e.

    v = (x_t - x) / max(t, 0.05) from data x, and (e - x_t) / max(1 - t, 0.05) from noise e, in at least fp32. Below the
    floor the velocity of the true data would be too small by t / 0.05. The loss compares velocities, so that the
    network learns there what yields the true one, x + (t - 0.05) v; JiT floors the target, too, and learns x.

    Args:
        output: the network's prediction (B, ...).
        x_t: its noisy input, shaped like ``output``.
        t: times (B,) in [0, 1].
        prediction: meaning of ``output``; a velocity is returned as it is.
    """
    if prediction == "velocity":
        return output
    x_t = at_least_fp32(x_t)
    t = t.to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1))
    if prediction == "data":
        return (x_t - output) / t.clamp_min(VELOCITY_FLOOR)
    return (output - x_t) / (1 - t).clamp_min(VELOCITY_FLOOR)


class Context(NamedTuple):
    """Tokens that join a sequence after some blocks, so that later blocks attend to them (in-context conditioning).

    Attributes:
        tokens: (B, M, width), placed before the sequence.
        start: number of blocks that run without them.
        condition: further arguments of the blocks from there on, which have N + M tokens.
    """

    tokens: Tensor
    start: int
    condition: tuple[Tensor, ...]


def check_patches(name: str, latent: LatentShape, patch_size: int) -> None:
    """Raise ValueError unless the latent is square and its side is a multiple of ``patch_size``."""
    if latent.height != latent.width:
        raise ValueError(f"denoiser.name = '{name}' needs square latents; got {latent.height} x {latent.width}")
    if patch_size < 1 or latent.height % patch_size:
        raise ValueError(
            f"denoiser.patch_size = {patch_size} does not divide the latent size {latent.height}; "
            f"allowed: {', '.join(str(p) for p in range(1, latent.height + 1) if latent.height % p == 0)}"
        )


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    *condition: Tensor,
    align_depth: int | Sequence[int],
    context: Context | None = None,
) -> tuple[Tensor, Tokens]:
    """Run the blocks; return the output and the tokens after the blocks in ``align_depth``, both (B, N, width).

    Args:
        blocks: called as ``block(x, *condition)``.
        x: tokens (B, N, width).
        condition: further arguments of each block.
        align_depth: block number counted from 1, or a list of them, for which a tuple of tokens is returned.
        context: tokens that join x on the way; they are not returned.
    """
    depths = [align_depth] if isinstance(align_depth, int) else align_depth
    first, taken = 0, []
    for depth, block in enumerate(blocks, 1):
        if context is not None and depth == context.start + 1:
            first, condition = context.tokens.shape[1], context.condition
            x = torch.cat([context.tokens, x], dim=1)
        x = block(x, *condition)
        if depth in depths:
            taken.append(x[:, first:] if first else x)
    return x[:, first:] if first else x, taken[0] if isinstance(align_depth, int) else tuple(taken)


def last_depth(align_depth: int | Sequence[int]) -> int:
    """The deepest block in ``align_depth``, counted from 1."""
    return align_depth if isinstance(align_depth, int) else align_depth[-1]


def check_blocks(depth: int, align_depth: int | Sequence[int], label_dropout: float) -> None:
    """Raise ValueError if the depth, an alignment depth or the label dropout is out of range."""
    if depth < 1:
        raise ValueError(f"denoiser.depth = {depth}: expected at least 1 block")
    depths = [align_depth] if isinstance(align_depth, int) else list(align_depth)
    if not depths or depths != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] <= depth:
        raise ValueError(
            f"denoiser.align_depth = {align_depth}: expected 1 to {depth} (the denoiser's depth), or an increasing list"
        )
    if not 0 <= label_dropout < 1:
        raise ValueError(f"denoiser.label_dropout = {label_dropout}: expected a probability in [0, 1)")
