"""Representation autoencoder (RAE, arXiv 2510.11690): tokens of a frozen encoder as latents, decoded by a ViT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Posterior, Tokenizer
from components.files import weights_file
from components.files.weights import load_strict
from components.nn.inner_encoder import load_encoder, make_encoder
from components.nn.precision import at_least_fp32
from components.nn.transformer import sincos_positions, unpatchify
from components.registry import File, tokenizers

# (width, blocks, heads, hidden features of the MLP) of the published decoders
DECODERS = {"B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096), "XL": (1152, 28, 16, 4096)}
WHAT = "[tokenizer] rae"
# (regular expression for a name in the published decoders, name here)
PUBLISHED = (
    ("trainable_cls_token", "cls_token"),
    ("decoder_embed", "embed"),
    ("decoder_norm", "norm"),
    ("decoder_pred", "pred"),
    (r"decoder_layers\.(\d+)\.attention\.output\.dense", r"blocks.\1.proj"),
    (r"decoder_layers\.(\d+)\.intermediate\.dense", r"blocks.\1.fc1"),
    (r"decoder_layers\.(\d+)\.output\.dense", r"blocks.\1.fc2"),
    (r"decoder_layers\.(\d+)\.layernorm_before", r"blocks.\1.norm1"),
    (r"decoder_layers\.(\d+)\.layernorm_after", r"blocks.\1.norm2"),
    (r"decoder_layers\.(\d+)\.attention\.attention\.(query|key|value)", r"blocks.\1.\2"),
)


@tokenizers.register("rae")
class RAE(Tokenizer):
    """RAE: tokens of a frozen encoder as latents, and a ViT decoder, which the recipe rae_decoder trains.

    The latent (B, D, R / patch_size, R / patch_size) consists of the encoder plugin's tokens, without the final norm's
    affine parameters if the encoder can omit that norm (``final_norm``, as timm encoders can), followed by layer norm
    without affine parameters. With several ``layers`` (RAEv2, arXiv 2605.18324), the tokens of each block take the
    place of the last one's, and are combined after that layer norm. The latent norm then scales the latent; as the
    published code does with ``latent_norm.per_position = true``. The encoding is deterministic: the posterior has the
    minimum standard deviation, 3e-7.

    The decoder embeds tokens linearly, adds a class token and fixed sine-cosine positions, and predicts each token's
    pixels.

    Args:
        encoder: name of an encoder plugin. Published: "dinov2" with ``encoder_options = { registers = true }``.
        encoder_options: options of that plugin.
        layers: the encoder's last so many blocks, or a list of blocks counted from 0. RAEv2's DINOv3-L "K = 7" is
            [11, 13, 15, 17, 19, 21, 23]; 1: the tokens that the encoder plugin returns.
        combine: of several layers: their mean, as the published code computes, or their sum, as the paper writes. The
            factor matters only to ``recipe.noise_tau``, because the latent norm removes it.
        token_mean: add to every token the mean over positions of the last of several layers, as the published code does
            for DINOv3 and SigLIP 2, but not for DINOv2.
        resolution: image side in pixels; must equal ``training.resolution``.
        patch_size: pixels per latent position along a side; the encoder's grid is ``resolution / patch_size``.
        decoder: preset for the decoder's width, depth, heads and hidden features.
        width: features per token of the decoder, a multiple of 4; overrides the preset.
        depth: number of blocks of the decoder; overrides the preset.
        heads: attention heads of the decoder; overrides the preset.
        hidden: hidden features of the decoder's MLPs; none: 4 * width if width is set, else the preset's.
        output: scale of the pixels that the decoder predicts. encoder: the encoder's input normalization, as in RAE's
            code; unit: [0, 1], as in RAEv2's.
        checkpoint: a published decoder (bytetriper/RAE), or a decoder or whole tokenizer saved by titanrepa: a file, a
            model folder, or hf://organization/name/file[@revision]; none: a random decoder.

    Raises:
        ValueError: the encoder does not exist or refuses its options, or a size is not divisible as required.
    """

    frozen_encoder = True

    def __init__(
        self,
        *,
        encoder: str = "dinov2",
        encoder_options: dict[str, Any] | None = None,
        layers: int | list[int] = 1,
        combine: Literal["mean", "sum"] = "mean",
        token_mean: bool = False,
        resolution: int = 256,
        patch_size: int = 16,
        decoder: Literal["B", "L", "XL"] = "XL",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        hidden: int | None = None,
        output: Literal["encoder", "unit"] = "encoder",
        checkpoint: File | None = None,
    ) -> None:
        super().__init__()
        preset = DECODERS[decoder]
        hidden = hidden or (4 * width if width else preset[3])
        width, depth, heads = width or preset[0], depth or preset[1], heads or preset[2]
        if patch_size < 1 or resolution % patch_size:
            raise ValueError(
                f"tokenizer.resolution = {resolution} is not a multiple of tokenizer.patch_size = {patch_size}"
            )
        if width % 4 or heads < 1 or width % heads:
            raise ValueError(f"tokenizer.width = {width}: expected a multiple of 4 and of tokenizer.heads = {heads}")
        self.output = output
        self.factor, self.resolution, self.checkpoint = patch_size, resolution, checkpoint
        self.grid = resolution // patch_size
        self.encoder_name = encoder
        self.encoder = make_encoder("tokenizer", encoder, encoder_options or {}, resolution, self.grid)
        self.encoder.drop_final_norm()  # its affine parameters would change the output of the non-affine norm
        self.layers = _chosen(layers, self.encoder.depth, encoder)
        if token_mean and not self.layers:
            raise ValueError("tokenizer.token_mean = true needs several tokenizer.layers")
        self.combine, self.token_mean = combine, token_mean
        self.variant = f"{combine} of {self.layers}, token_mean = {token_mean}\n" if self.layers else ""
        self.channels: int = self.encoder.embed_dim
        self.decoder = Decoder(self.channels, self.grid, patch_size, width, depth, heads, hidden)

    def train(self, mode: bool = True) -> RAE:
        """Set the mode of the decoder; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> (B, D, R / patch_size, R / patch_size), without gradients."""
        self._check_side(x.shape[-1], 1)
        with torch.no_grad():
            tokens = self._several_layers(x) if self.layers else _normalized(self.encoder(x))
            z = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid)).contiguous()
        return Posterior(z, torch.full_like(z, -30.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, 3, R, R), nominally in [-1, 1]."""
        self._check_side(z.shape[-1], self.factor)
        x = self.decoder(z.flatten(2).transpose(1, 2))
        if self.output == "unit":
            return x * 2 - 1
        if self.encoder.pixel_stats is None:
            return x
        # x is in the encoder's input normalization, (image in [0, 1] - mean) / std.
        mean, std = self.encoder.pixel_stats
        return (x * std + mean) * 2 - 1

    def last_layer(self) -> nn.Module:
        """Return the decoder's prediction of pixels."""
        return self.decoder.pred

    def load_weights(self) -> None:
        """Load the encoder's weights and, if set, the decoder's ``checkpoint``.

        Raises:
            WeightsError: a file is missing, unreadable, or does not fit the architecture.
        """
        state = {} if self.checkpoint is None else weights_file.read(self.checkpoint, WHAT).tensors
        if any(key.startswith("encoder.") for key in state):
            load_strict(self, state, WHAT, self.checkpoint)
            return
        load_encoder(self.encoder, self.encoder_name, WHAT, "[tokenizer.encoder_options]")
        if state:
            state = {key.removeprefix("decoder."): value for key, value in state.items()}
            load_strict(self.decoder, from_published(state), WHAT, self.checkpoint)

    def units(self) -> Sequence[nn.Module]:
        """Return the whole encoder and the decoder's blocks."""
        return [self.encoder, *self.decoder.blocks]

    def compiled_methods(self) -> Sequence[Any]:
        """Return the encoder's method for several layers, if they are used."""
        return [self.encoder.block_tokens] if self.layers else []

    def _several_layers(self, x: Tensor) -> Tensor:
        """Combined tokens (B, N, D) of ``layers``."""
        found = [_normalized(tokens) for tokens in self.encoder.block_tokens(x, self.layers)]
        total = torch.stack(found).mean(0) if self.combine == "mean" else torch.stack(found).sum(0)
        return total + found[-1].mean(1, keepdim=True) if self.token_mean else total

    def _check_side(self, side: int, scale: int) -> None:
        if side * scale != self.resolution:
            raise ValueError(
                f"{WHAT}: expected images of {self.resolution} px, got {side * scale} px; set tokenizer.resolution"
            )


class Decoder(nn.Module):
    """Pre-norm ViT with a class token: tokens (B, n * n, D) -> pixels (B, 3, n * patch_size, n * patch_size)."""

    positions: Tensor

    def __init__(
        self, channels: int, grid: int, patch_size: int, width: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # The class token's position embedding is zero.
        self.register_buffer("positions", F.pad(sincos_positions(width, grid), (0, 0, 1, 0)), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return unpatchify(self.pred(self.norm(x))[:, 1:], 3)


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, width) -> (B, N, width)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename published keys of a decoder's state dict; other keys are kept and the fixed positions are dropped."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in PUBLISHED:
            key, found = re.subn(rf"^{theirs}(?=\.|$)", ours, key)
            if found:
                break
        renamed[key] = value
    renamed.pop("decoder_pos_embed", None)
    return renamed


def _normalized(tokens: Tensor) -> Tensor:
    """Layer norm without affine parameters."""
    tokens = at_least_fp32(tokens)
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def _chosen(layers: int | list[int], depth: int, encoder: str) -> tuple[int, ...]:
    """Indices of several blocks; none for ``layers`` = 1."""
    if layers == 1:
        return ()
    if not depth:
        raise ValueError(f"tokenizer.layers = {layers}: encoder '{encoder}' returns one layer; set it to 1")
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ValueError(f"tokenizer.layers = {layers}: expected 1 to {depth}, the blocks of encoder '{encoder}'")
        return tuple(range(depth - layers, depth))
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(
            f"tokenizer.layers = {layers}: expected ascending blocks of encoder '{encoder}', from 0 to {depth - 1}"
        )
    return tuple(layers)
