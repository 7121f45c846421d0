"""LightningDiT (arXiv 2501.01423): SiT with RMS norm, SwiGLU and rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
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
from components.nn.transformer import (
    BottleneckPatchEmbedding,
    Context,
    PatchEmbedding,
    TimeEmbedding,
    check_blocks,
    check_patches,
    last_depth,
    run_blocks,
    sincos_positions,
    to_velocity,
    unpatchify,
)
from components.registry import denoisers

# (width, depth, heads)
SIZES = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "1p0B": (1536, 24, 24),
    "1p6B": (1792, 28, 28),
}


@denoisers.register("lightningdit")
class LightningDiT(Denoiser):
    """LightningDiT: RMS norm, SwiGLU, rotary positions; sizes B, L, XL, 1p0B, 1p6B or any width, depth and heads.

    State-dict keys are those of the published checkpoints (hustvl/LightningDiT). These were trained with the opposite
    time direction (0 is noise, 1 is data), so their velocity has the opposite sign: load them with ``reversed_time``.

    Args:
        size: published preset for width, depth and heads; the paper uses XL.
        patch_size: latent positions per token side, a divisor of the latent's side. Published for f16: 1.
        align_depth: block whose tokens are aligned, counted from 1; a list selects several.
        label_dropout: probability of replacing a label with the null label in training; 0: no null label.
        qk_norm: apply RMS norm to queries and keys. Published XL: false.
        width: features per token; overrides the preset.
        depth: number of blocks; overrides the preset.
        heads: attention heads; overrides the preset.
        label_std: standard deviation for initializing label embeddings.
        mlp_ratio: MLP width / token width of a plain MLP; SwiGLU uses 2 / 3 of it, for the same number of weights.
        reversed_time: for weights trained with 0 for noise and 1 for data, as published: pass 1 - t to the network and
            negate the velocity that it predicts.
        prediction: what the network predicts, on the linear path; the denoiser converts it to the velocity.
        bottleneck: features between patch and token in the patch embedding (JiT); 0: one linear layer.
        context_tokens: number of class tokens that later blocks attend to beside the patch tokens (JiT): the label's
            embedding plus learned positions; 0: none.
        context_start: number of blocks that run before the class tokens join.

    Raises:
        ValueError: the latent is not square or not divisible into patches; ``align_depth`` exceeds the depth; the
            width divided by the heads is not a multiple of 4; or ``bottleneck``, ``context_tokens`` or
            ``context_start`` is out of range.
    """

    adapters = (RepaeCheckpoint,)
    pos_embed: Tensor

    def __init__(
        self,
        latent: LatentShape,
        num_classes: int,
        *,
        size: Literal["B", "L", "XL", "1p0B", "1p6B"] = "XL",
        patch_size: int = 1,
        align_depth: int | list[int] = 8,
        label_dropout: float = 0.1,
        qk_norm: bool = False,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        label_std: float = 0.02,
        mlp_ratio: float = 4.0,
        reversed_time: bool = False,
        prediction: Prediction = "velocity",
        bottleneck: int = 0,
        context_tokens: int = 0,
        context_start: int = 0,
    ) -> None:
        super().__init__()
        preset = SIZES[size]
        width, depth, heads = width or preset[0], depth or preset[1], heads or preset[2]
        check_patches("lightningdit", latent, patch_size)
        check_blocks(depth, align_depth, label_dropout)
        check_rotary("", width, heads)
        if bottleneck < 0 or context_tokens < 0:
            raise ValueError(
                f"denoiser.bottleneck = {bottleneck} and denoiser.context_tokens = {context_tokens}: expected 0 (none) "
                "or more"
            )
        if not 0 <= context_start < depth:
            raise ValueError(
                f"denoiser.context_start = {context_start}: expected 0 to {depth - 1}, so that one of the denoiser's "
                f"{depth} blocks sees the class tokens"
            )
        self.width = width
        self.align_depth = align_depth
        self.label_dropout = label_dropout
        self.label_std = label_std
        self.null_label = num_classes
        self.grid = latent.height // patch_size
        self.channels = latent.channels
        self.reversed_time = reversed_time
        self.prediction = prediction
        self.context_tokens, self.context_start = context_tokens, context_start

        self.x_embedder = (
            BottleneckPatchEmbedding(latent.channels, patch_size, bottleneck, width)
            if bottleneck
            else PatchEmbedding(latent.channels, patch_size, width)
        )
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder: Any = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + (label_dropout > 0), width)
        # A buffer, so that unfreezing all parameters does not make it trainable.
        self.register_buffer("pos_embed", torch.empty(1, self.grid**2, width))
        if context_tokens:  # named as in the published JiT checkpoints
            self.in_context_posemb = nn.Parameter(torch.empty(1, context_tokens, width))
        self.feat_rope = Rotary(width // heads, self.grid)
        self.blocks = nn.ModuleList(LightningBlock(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = LightningFinalLayer(width, patch_size**2 * latent.channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize linear layers with Xavier uniform, modulation and output with zeros (identity blocks)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.x_embedder.init_weights()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.label_std)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.context_tokens:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        init_lightning(self.blocks, self.final_layer)
        self.feat_rope.init_weights()
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_positions(self.width, self.grid))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        """Predict the velocity; see ``contracts.Denoiser``.

        Args:
            x_t: noisy latents (B, C, h, w).
            t: times (B,) in [0, 1].
            condition: classes (B,) in [0, num_classes].
        """
        x, tokens, c = self._run(x_t, t, condition, len(self.blocks))
        output = unpatchify(self.final_layer(x, c), self.channels)
        if self.reversed_time and self.prediction == "velocity":
            output = -output
        return DenoiserOutput(to_velocity(output, x_t, t, self.prediction), tokens)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tokens:
        """Return hidden tokens (B, N, width) after each block in ``align_depth``; later blocks do not run."""
        return self._run(x_t, t, condition, last_depth(self.align_depth))[1]

    def units(self) -> Sequence[nn.Module]:
        """Return the transformer blocks."""
        return list(self.blocks)

    def _run(self, x_t: Tensor, t: Tensor, condition: Condition, depth: int) -> tuple[Tensor, Tokens, Tensor]:
        """Run the first ``depth`` blocks; return their output, the aligned tokens and the condition (B, 1, width)."""
        x = self.x_embedder(x_t) + self.pos_embed  # an fp32 residual stream under autocast, as published
        time = self.t_embedder(1 - t if self.reversed_time else t, x.dtype)
        label = self.y_embedder.embedding_table(condition.label).to(x.dtype)
        c, context = (time + label)[:, None], None
        if self.context_tokens:
            rotary = self.feat_rope(self.context_tokens)
            context = Context(label[:, None] + self.in_context_posemb, self.context_start, (c, *rotary))
        blocks = self.blocks[:depth]
        x, tokens = run_blocks(blocks, x, c, *self.feat_rope(), align_depth=self.align_depth, context=context)
        return x, tokens, c
