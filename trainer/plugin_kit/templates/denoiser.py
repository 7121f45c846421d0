"""Describe the plugin and cite its source here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape
from components.nn.precision import at_least_fp32
from components.registry import denoisers


@denoisers.register("template")
class Template(Denoiser):
    """Residual token mixer with one token per latent position. Replace the network and this line, which listings show.

    Args:
        width: features per token.
        depth: number of blocks.
        align_depth: block whose tokens are aligned, counted from 1.
        label_dropout: probability of replacing a label with the null label in training.
    """

    def __init__(
        self,
        latent: LatentShape,
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 4,
        align_depth: int = 2,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"denoiser.width = {width}: expected at least 1")
        if not 1 <= align_depth <= depth:
            raise ValueError(f"denoiser.align_depth = {align_depth}: expected 1 to {depth} (denoiser.depth)")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"denoiser.label_dropout = {label_dropout}: expected a probability in [0, 1)")
        self.width = width
        self.grid = latent.height
        self.align_depth = align_depth
        self.label_dropout = label_dropout
        self.null_label = num_classes
        self.embed = nn.Linear(latent.channels, width)
        self.positions = nn.Parameter(torch.empty(self.grid**2, width))
        self.time = nn.Linear(1, width)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, self.grid**2) for _ in range(depth))
        self.out = nn.Linear(width, latent.channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter and buffer: training constructs the module on the meta device first."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        """Predict the velocity from x_t (B, C, h, w), t (B,) in [0, 1] and labels (B,) in [0, null_label]."""
        tokens = self.tokens(x_t, t, condition)
        x = tokens
        for block in self.blocks[self.align_depth :]:
            x = block(x)
        velocity = self.out(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return DenoiserOutput(velocity, tokens)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return hidden tokens (B, h * w, width) after block ``align_depth``; later blocks do not run."""
        x = self.embed(x_t.flatten(2).transpose(1, 2)) + self.positions
        x = x + self.time(t.to(x.dtype)[:, None])[:, None] + self.labels(condition.label)[:, None]
        for block in self.blocks[: self.align_depth]:
            x = block(x)
        return x

    def units(self) -> Sequence[nn.Module]:
        """Return the sub-modules to compile, checkpoint and shard one by one; use each only through its forward."""
        return list(self.blocks)


class Block(nn.Module):
    """Mixes tokens, then features: (B, N, width) -> (B, N, width)."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(tokens, tokens)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(at_least_fp32(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(at_least_fp32(x)))
