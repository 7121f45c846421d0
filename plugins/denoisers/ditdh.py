"""DiT-DH (arXiv 2510.11690): a DiT whose tokens condition a shallow, wide denoising head."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape, Prediction, Tokens
from components.files import weights_file
from components.files.adapter import State, StateDictAdapter
from components.files.repae import RepaeCheckpoint
from components.files.weights_file import WeightsFile
from components.nn.lightningdit import (
    LightningBlock,
    LightningFinalLayer,
    PlainBlock,
    Rotary,
    check_rotary,
    init_lightning,
)
from components.nn.precision import at_least_fp32
from components.nn.transformer import (
    Context,
    PatchEmbedding,
    check_blocks,
    check_patches,
    run_blocks,
    sincos_positions,
    to_velocity,
    unpatchify,
)
from components.registry import denoisers

# (width, depth, heads) of the base; all sizes have the same head.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

# (regular expression for a name here, name in the published RAEv2 code), of a base conditioned in context
RAEV2 = (
    (r"^time_tokens$", "t_embedder.learnable_tokens"),
    (r"^class_tokens$", "ctx_embedder.learnable_tokens"),
    (r"^y_embedder\.", "ctx_embedder."),
    (r"^(enc|dec)_feat_rope\.", r"\1_rope."),
    (r"^early_layer\.", "base_final_layer."),
    (r"\bnorm_final\.", "norm."),
    (r"\badaLN_modulation\.", "adaln_modulation."),
)
LABELS = "ctx_embedder.embedding_table.weight"


class Raev2Checkpoint(StateDictAdapter):
    """A checkpoint of the published RAEv2 code (nanovisionx/RAEv2), for a base that is conditioned in context."""

    name = "raev2"

    def keys(self) -> Collection[str]:
        """Keys of the published network."""
        return self._published().values()

    def recognizes(self, file: WeightsFile, role: str) -> bool:
        """Whether a file holds the published network, by its name of the class embedding."""
        return weights_file.holds(file, role, [LABELS])

    def from_file(self, file: WeightsFile, role: str, what: str) -> dict[str, State]:
        """Take the denoiser; its rotary table also has rows of the condition's tokens, which are not rotated."""
        state, ours = super().from_file(file, role, what)["denoiser"], {v: k for k, v in self._published().items()}
        rows = self.plugin.grid**2
        return {
            "denoiser": {
                ours.get(key, key): value[:rows] if key.startswith("enc_rope.") else value
                for key, value in state.items()
            }
        }

    @classmethod
    def num_classes(cls, file: WeightsFile, label_dropout: float) -> int:
        """Rows of the class embedding, without the null label's."""
        table = next((value for key, value in file.tensors.items() if key.endswith(LABELS)), None)
        return 0 if table is None else len(table) - (label_dropout > 0)

    def _published(self) -> dict[str, str]:
        """Published name of each of the plugin's keys."""
        found = {}
        for key in self.plugin.state_dict():
            found[key] = key
            for ours, theirs in RAEV2:
                found[key] = re.sub(ours, theirs, found[key])
        return found


@denoisers.register("ditdh")
class DiTDH(Denoiser):
    """DiT-DH: a base DiT with a wide, shallow diffusion head, for latents with many channels; sizes S, B, L, XL.

    The base maps x_t, t and the label to tokens, which are the ones aligned. The head embeds x_t again, with a width
    large enough to keep all channels; the base token at the same position, together with t, modulates each head token.
    Both use LightningDiT blocks.

    With ``time_tokens`` and ``class_tokens``, the base is conditioned in context, as in RAEv2 (arXiv 2605.18324): it
    attends to learned tokens, to which the embedding of t or of the class is added, beside the patch tokens; its blocks
    have no modulation, its patch tokens only rotary positions, and all blocks separate matrices for queries, keys,
    values and gates. With ``early_depth``, the tokens of an early block predict the latent a second time, which
    internal guidance takes for the weaker model.

    State-dict keys, time and velocity follow the published checkpoints (bytetriper/RAE); those of RAEv2
    (nanovisionx/RAEv2) are converted.

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
        time_tokens: tokens of the time, for in-context conditioning of the base; 0: adaLN. RAEv2: 4, with qk_norm.
        class_tokens: tokens of the class; either both are 0, or none. RAEv2: 8.
        early_depth: block of the base, counted from 1, that predicts early; 0: none. RAEv2: 8.
        early_weight: weight of the early prediction's loss beside the final one's. RAEv2: 1.

    Raises:
        ValueError: the latent is not square or not divisible into patches; ``align_depth`` or ``early_depth`` exceeds
            the base's depth; a width divided by its heads is not a multiple of 4; or only one of ``time_tokens`` and
            ``class_tokens`` is 0.
    """

    adapters = (Raev2Checkpoint, RepaeCheckpoint)
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
        time_tokens: int = 0,
        class_tokens: int = 0,
        early_depth: int = 0,
        early_weight: float = 1.0,
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
        if min(time_tokens, class_tokens) < 0 or (time_tokens > 0) != (class_tokens > 0):
            raise ValueError(
                f"denoiser.time_tokens = {time_tokens} and denoiser.class_tokens = {class_tokens}: expected both above "
                "0, for in-context conditioning, or both 0"
            )
        if not 0 <= early_depth <= depth or early_weight < 0:
            raise ValueError(
                f"denoiser.early_depth = {early_depth} with denoiser.early_weight = {early_weight}: expected 0 (none) "
                f"to {depth}, the base's depth, and a weight of at least 0"
            )
        self.width, self.depth = width, depth
        self.align_depth = align_depth
        self.label_dropout = label_dropout
        self.label_std = label_std
        self.prediction = prediction
        self.early_depth, self.early_weight = early_depth, early_weight
        self.in_context = time_tokens > 0
        self.null_label = num_classes
        self.grid = latent.height // patch_size
        self.channels = latent.channels

        self.s_embedder = PatchEmbedding(latent.channels, patch_size, width)
        self.x_embedder = PatchEmbedding(latent.channels, patch_size, head_width)
        self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.t_embedder = FourierEmbedding(width)
        self.y_embedder: Any = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + (label_dropout > 0), width)
        if self.in_context:
            self.time_tokens = nn.Parameter(torch.empty(time_tokens, width))
            self.class_tokens = nn.Parameter(torch.empty(class_tokens, width))
        else:  # a buffer, so that unfreezing all parameters does not make it trainable
            self.register_buffer("pos_embed", torch.empty(1, self.grid**2, width))
        self.enc_feat_rope = Rotary(width // heads, self.grid)
        self.dec_feat_rope = Rotary(head_width // head_heads, self.grid)
        base, fused = PlainBlock if self.in_context else LightningBlock, not self.in_context
        self.blocks = nn.ModuleList(
            [base(width, heads, mlp_ratio, qk_norm, fused) for _ in range(depth)]
            + [LightningBlock(head_width, head_heads, mlp_ratio, qk_norm, fused) for _ in range(head_depth)]
        )
        self.final_layer = LightningFinalLayer(head_width, patch_size**2 * latent.channels)
        if early_depth:
            self.early_layer = LightningFinalLayer(width, patch_size**2 * latent.channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize linear layers with PyTorch's default, modulation and output with zeros (identity blocks)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        for module in (self.s_embedder, self.x_embedder, self.t_embedder, self.enc_feat_rope, self.dec_feat_rope):
            module.init_weights()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.label_std)
        init_lightning(self.blocks, self.final_layer, *([self.early_layer] if self.early_depth else []))
        if self.in_context:
            for tokens in (self.time_tokens, self.class_tokens):
                nn.init.normal_(tokens, std=self.width**-0.5)
        elif not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_positions(self.width, self.grid))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        """Predict the velocity; see ``contracts.Denoiser``.

        Args:
            x_t: noisy latents (B, C, h, w).
            t: times (B,) in [0, 1].
            condition: classes (B,) in [0, num_classes].
        """
        aligned = self._aligned()
        taken = sorted({*aligned, self.early_depth} - {0})
        s, after, time = self._base(x_t, t, condition, self.depth, taken)
        early = None
        if self.early_depth:
            h = F.silu(after[self.early_depth] + time)
            early = to_velocity(unpatchify(self.early_layer(h, h), self.channels), x_t, t, self.prediction)
        s = self.s_projector(F.silu(s + time))
        x, positions = self.x_embedder(x_t).to(self._residual()), self.dec_feat_rope()
        for block in self.blocks[self.depth :]:
            x = block(x, s, *positions)
        output = unpatchify(self.final_layer(x, s), self.channels)
        velocity = to_velocity(output, x_t, t, self.prediction)
        tokens = tuple(after[depth] for depth in aligned)
        return DenoiserOutput(velocity, tokens[0] if isinstance(self.align_depth, int) else tokens, early=early)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tokens:
        """Return the base's tokens (B, N, width) after each block in ``align_depth``; later blocks do not run."""
        aligned = self._aligned()
        after = tuple(self._base(x_t, t, condition, aligned[-1], aligned)[1].values())
        return after[0] if isinstance(self.align_depth, int) else after

    def units(self) -> Sequence[nn.Module]:
        """Return the transformer blocks of the base, then those of the head."""
        return list(self.blocks)

    def _base(
        self, x_t: Tensor, t: Tensor, condition: Condition, depth: int, taken: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """Run ``depth`` blocks; return their output, tokens after the blocks ``taken``, and the time (B, 1, width)."""
        s = self.s_embedder(x_t).to(self._residual())
        time = self.t_embedder(t, s.dtype)[:, None]
        label = self.y_embedder.embedding_table(condition.label).to(s.dtype)[:, None]
        blocks = self.blocks[:depth]
        if self.in_context:
            tokens = torch.cat([self.time_tokens + time, self.class_tokens + label], dim=1)
            context = Context(tokens, 0, self.enc_feat_rope(tokens.shape[1]))
            s, after = run_blocks(blocks, s, align_depth=taken, context=context)
        else:
            c = F.silu(time + label)  # the blocks' modulation applies a second SiLU
            s, after = run_blocks(blocks, s + self.pos_embed, c, *self.enc_feat_rope(), align_depth=taken)
        return s, dict(zip(taken, after)), time

    def _residual(self) -> torch.dtype:
        """dtype of the residual streams, that of the weights: fp32 under autocast."""
        return self.time_tokens.dtype if self.in_context else self.pos_embed.dtype

    def _aligned(self) -> list[int]:
        return [self.align_depth] if isinstance(self.align_depth, int) else list(self.align_depth)


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
