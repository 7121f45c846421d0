"""SiT: scalable interpolant transformer (arXiv 2401.08740), a DiT (arXiv 2212.09748) that predicts velocity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape, Prediction, Tokens
from components.files.repae import RepaeCheckpoint
from components.nn.transformer import (
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
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@denoisers.register("sit")
class SiT(Denoiser):
    """SiT with adaLN-Zero conditioning; sizes S, B, L, XL or any width, depth and heads.

    State-dict keys are those of the published SiT and REPA-E checkpoints.

    Args:
        size: published preset for width, depth and heads.
        patch_size: latent positions per token side, a divisor of the latent's side.
        align_depth: block whose tokens are aligned, counted from 1; a list selects several.
        label_dropout: probability of replacing a label with the null label in training; 0: no null label.
        qk_norm: apply layer norm to queries and keys.
        width: features per token; overrides the preset.
        depth: number of blocks; overrides the preset.
        heads: attention heads; overrides the preset.
        label_std: standard deviation for initializing label embeddings. Published: 0.02; larger values help short
            runs learn the classes sooner.
        mlp_ratio: MLP width / token width.
        class_token_dim: features of an encoder's class token that is denoised with the latent (REG, arXiv
            2507.01467); 0: none.
        prediction: what the network predicts, on the linear path; the denoiser converts it to the velocity.

    Raises:
        ValueError: the latent is not square or not divisible into patches; ``align_depth`` exceeds the depth; or the
            width is not a multiple of the heads and of 4 (position embedding).
    """

    adapters = (RepaeCheckpoint,)
    pos_embed: Tensor

    def __init__(
        self,
        latent: LatentShape,
        num_classes: int,
        *,
        size: Literal["S", "B", "L", "XL"] = "XL",
        patch_size: int = 2,
        align_depth: int | list[int] = 8,
        label_dropout: float = 0.1,
        qk_norm: bool = False,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        label_std: float = 0.02,
        mlp_ratio: float = 4.0,
        class_token_dim: int = 0,
        prediction: Prediction = "velocity",
    ) -> None:
        super().__init__()
        preset = SIZES[size]
        width, depth, heads = width or preset[0], depth or preset[1], heads or preset[2]
        check_patches("sit", latent, patch_size)
        check_blocks(depth, align_depth, label_dropout)
        _check_width(width, heads)
        if class_token_dim < 0:
            raise ValueError(f"denoiser.class_token_dim = {class_token_dim}: expected 0 (none) or a number of features")
        self.width = width
        self.align_depth = align_depth
        self.label_dropout = label_dropout
        self.label_std = label_std
        self.prediction = prediction
        self.num_classes = num_classes
        self.null_label = num_classes
        self.grid = latent.height // patch_size
        self.channels = latent.channels
        self.noisy_inputs = {"class_token": (class_token_dim,)} if class_token_dim else {}

        self.x_embedder = PatchEmbedding(latent.channels, patch_size, width)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder: Any = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + (label_dropout > 0), width)
        # A buffer, so that unfreezing all parameters does not make it trainable. Persistent, as in released weights.
        self.register_buffer("pos_embed", torch.empty(1, self.grid**2 + (class_token_dim > 0), width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * latent.channels, class_token_dim)
        if class_token_dim:  # named as in the published REG checkpoints
            self.cls_projectors2 = nn.Linear(class_token_dim, width)
            self.wg_norm = nn.LayerNorm(width, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize linear layers with Xavier uniform, modulation and output with zeros (identity blocks)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.x_embedder.init_weights()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.label_std)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[-1].weight)
            nn.init.zeros_(module.adaLN_modulation[-1].bias)
        for layer in (self.final_layer.linear, self.final_layer.linear_cls):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        if not self.pos_embed.is_meta:
            # The class token's position embedding is zero.
            self.pos_embed.zero_()[:, -(self.grid**2) :] = sincos_positions(self.width, self.grid)

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, class_token: Tensor | None = None
    ) -> DenoiserOutput:
        """Predict the velocity; see ``contracts.Denoiser``.

        Args:
            x_t: noisy latents (B, C, h, w).
            t: times (B,) in [0, 1].
            condition: classes (B,) in [0, num_classes].
            class_token: noisy class token (B, class_token_dim); required if and only if ``class_token_dim`` is not 0.

        Raises:
            ValueError: ``class_token`` is missing or unexpected.
        """
        x, c = self._embed(x_t, t, condition, class_token)
        x, tokens = run_blocks(self.blocks, x, c, align_depth=self.align_depth)
        patches, vector = self.final_layer(x, c)
        velocity = to_velocity(unpatchify(patches, self.channels), x_t, t, self.prediction)
        others = {}
        if class_token is not None and vector is not None:
            others["class_token"] = to_velocity(vector, class_token, t, self.prediction)
        return DenoiserOutput(velocity, tokens, others)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition, class_token: Tensor | None = None) -> Tokens:
        """Return hidden tokens (B, N, width) after each block in ``align_depth``; later blocks do not run."""
        x, c = self._embed(x_t, t, condition, class_token)
        return run_blocks(self.blocks[: last_depth(self.align_depth)], x, c, align_depth=self.align_depth)[1]

    def units(self) -> Sequence[nn.Module]:
        """Return the transformer blocks."""
        return list(self.blocks)

    def _embed(self, x_t: Tensor, t: Tensor, condition: Condition, class_token: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.x_embedder(x_t)
        if (class_token is not None) != bool(self.noisy_inputs):
            (dim,) = self.noisy_inputs.get("class_token", (0,))
            raise ValueError(
                f"denoiser.class_token_dim = {dim}, but the recipe passes the denoiser "
                f"{'no' if class_token is None else 'a'} class token; set it to 0, or use a recipe such as 'reg'"
            )
        if class_token is not None:
            token = self.wg_norm(self.cls_projectors2(class_token.to(x.dtype)))
            x = torch.cat([token[:, None].to(x.dtype), x], dim=1)
        # fp32 under autocast, as in the published code: bf16 would round off small updates of the residual stream.
        x = x + self.pos_embed
        return x, self.t_embedder(t, x.dtype) + self.y_embedder.embedding_table(condition.label).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP, each shifted, scaled and gated by the conditioning vector (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, width), c (B, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Output layer: patch tokens to latent patches and, if the model has one, the class token to its vector."""

    def __init__(self, width: int, out_features: int, class_token_dim: int = 0) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.linear_cls = nn.Linear(width, class_token_dim) if class_token_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        x = self.norm_final(x) * (1 + scale) + shift
        if self.linear_cls is None:
            return self.linear(x), None
        return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])


def _check_width(width: int, heads: int) -> None:
    if width < 4 or width % 4 or heads < 1 or width % heads:
        raise ValueError(
            f"denoiser.width = {width} with denoiser.heads = {heads}: the width must be a multiple of 4 "
            "(position embedding) and of the number of heads"
        )
