"""DiT-DH (arXiv 2510.11690): a DiT whose tokens condition a shallow, wide denoising head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape, Prediction, Tokens
from components.files.repae import RepaeCheckpoint
from components.nn.lightningdit import (
    LightningBlock,
    LightningFinalLayer,
    Rotary,
    check_rotary,
    init_lightning,
)
from components.nn.precision import at_least_fp32
from components.nn.transformer import (
    PatchEmbedding,
    check_blocks,
    check_patches,
    last_depth,
    run_blocks,
    sincos_positions,
    to_velocity,
    unpatchify,
)
from components.registry import denoisers

# (width, depth, heads) of the base; all sizes have the same head.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@denoisers.register("ditdh")
class DiTDH(Denoiser):
    """DiT-DH: a base DiT with a wide, shallow diffusion head, for latents with many channels; sizes S, B, L, XL.

    The base maps x_t, t and the label to tokens, which are the ones aligned. The head embeds x_t again, with a width
    large enough to keep all channels; the base token at the same position, together with t, modulates each head token.
    Both use LightningDiT blocks.

    State-dict keys, time and velocity follow the published checkpoints (bytetriper/RAE).

    Args:
        size: preset for the width, depth and heads of the base.
        patch_size: latent positions per token side, a divisor of the latent's side. Published: 1.
        align_depth: block of the base whose tokens are aligned, counted from 1; a list selects several.
        label_dropout: probability of replacing a label with the null label in training; 0: no null label.
        qk_norm: apply RMS norm to queries and keys. Published: false.
        width: features per token of the base; overrides the preset.
        depth: number of blocks of the base; overrides the preset.
        heads: attention heads of the base; overrides the preset.
        head_width: features per token of the head; should be at least the features of a patch, so that none are lost.
        head_depth: number of blocks of the head.
        head_heads: attention heads of the head.
        label_std: standard deviation for initializing label embeddings.
        mlp_ratio: MLP width / token width of a plain MLP; SwiGLU uses 2 / 3 of it, for the same number of weights.
        prediction: what the network predicts, on the linear path; the denoiser converts it to the velocity.

    Raises:
        ValueError: the latent is not square or not divisible into patches; ``align_depth`` exceeds the base's depth;
            or a width divided by its heads is not a multiple of 4.
    """

    adapters = (RepaeCheckpoint,)
    pos_embed: Tensor

    def __init__(
        self,
        latent: LatentShape,
        num_classes: int,
        *,
        size: Literal["S", "B", "L", "XL"] = "XL",
        patch_size: int = 1,
        align_depth: int | list[int] = 8,
        label_dropout: float = 0.1,
        qk_norm: bool = False,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        head_width: int = 2048,
        head_depth: int = 2,
        head_heads: int = 16,
        label_std: float = 0.02,
        mlp_ratio: float = 4.0,
        prediction: Prediction = "velocity",
    ) -> None:
        super().__init__()
        preset = SIZES[size]
        width, depth, heads = width or preset[0], depth or preset[1], heads or preset[2]
        check_patches("ditdh", latent, patch_size)
        check_blocks(depth, align_depth, label_dropout)
        check_rotary("", width, heads)
        check_rotary("head_", head_width, head_heads)
        if head_depth < 1:
            raise ValueError(f"denoiser.head_depth = {head_depth}: expected at least 1 block")
        self.width, self.depth = width, depth
        self.align_depth = align_depth
        self.label_dropout = label_dropout
        self.label_std = label_std
        self.prediction = prediction
        self.null_label = num_classes
        self.grid = latent.height // patch_size
        self.channels = latent.channels

        self.s_embedder = PatchEmbedding(latent.channels, patch_size, width)
        self.x_embedder = PatchEmbedding(latent.channels, patch_size, head_width)
        self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.t_embedder = FourierEmbedding(width)
        self.y_embedder: Any = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + (label_dropout > 0), width)
        # A buffer, so that unfreezing all parameters does not make it trainable.
        self.register_buffer("pos_embed", torch.empty(1, self.grid**2, width))
        self.enc_feat_rope = Rotary(width // heads, self.grid)
        self.dec_feat_rope = Rotary(head_width // head_heads, self.grid)
        self.blocks = nn.ModuleList(
            [LightningBlock(width, heads, mlp_ratio, qk_norm) for _ in range(depth)]
            + [LightningBlock(head_width, head_heads, mlp_ratio, qk_norm) for _ in range(head_depth)]
        )
        self.final_layer = LightningFinalLayer(head_width, patch_size**2 * latent.channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize linear layers with PyTorch's default, modulation and output with zeros (identity blocks)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        for module in (self.s_embedder, self.x_embedder, self.t_embedder, self.enc_feat_rope, self.dec_feat_rope):
            module.init_weights()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.label_std)
        init_lightning(self.blocks, self.final_layer)
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_positions(self.width, self.grid))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        """Predict the velocity; see ``contracts.Denoiser``.

        Args:
            x_t: noisy latents (B, C, h, w).
            t: times (B,) in [0, 1].
            condition: classes (B,) in [0, num_classes].
        """
        s, c, time = self._embed(x_t, t, condition)
        base, head = self.blocks[: self.depth], self.blocks[self.depth :]
        s, tokens = run_blocks(base, s, c, *self.enc_feat_rope(), align_depth=self.align_depth)
        s = self.s_projector(F.silu(s + time))
        x, positions = self.x_embedder(x_t).to(self.pos_embed.dtype), self.dec_feat_rope()
        for block in head:
            x = block(x, s, *positions)
        output = unpatchify(self.final_layer(x, s), self.channels)
        return DenoiserOutput(to_velocity(output, x_t, t, self.prediction), tokens)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tokens:
        """Return the base's tokens (B, N, width) after each block in ``align_depth``; later blocks do not run."""
        s, c, _ = self._embed(x_t, t, condition)
        blocks = self.blocks[: last_depth(self.align_depth)]
        return run_blocks(blocks, s, c, *self.enc_feat_rope(), align_depth=self.align_depth)[1]

    def units(self) -> Sequence[nn.Module]:
        """Return the transformer blocks of the base, then those of the head."""
        return list(self.blocks)

    def _embed(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        s = self.s_embedder(x_t) + self.pos_embed  # an fp32 residual stream under autocast
        time = self.t_embedder(t, s.dtype)
        # The blocks' modulation applies a second SiLU.
        c = F.silu(time + self.y_embedder.embedding_table(condition.label).to(s.dtype))
        return s, c[:, None], time[:, None]


class FourierEmbedding(nn.Module):
    """Fourier features of t at 256 fixed random frequencies ~ N(0, 1), then an MLP: (B,) -> (B, width)."""

    FREQUENCIES = 256
    W: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("W", torch.empty(self.FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def init_weights(self) -> None:
        """Sample the frequencies and the MLP's weights; the biases keep their values."""
        nn.init.normal_(self.W)
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        # At least fp32 for any network dtype: bf16 rounds t = 0.999 to 1.
        angles = 2 * math.pi * at_least_fp32(t)[:, None] * at_least_fp32(self.W)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype))
