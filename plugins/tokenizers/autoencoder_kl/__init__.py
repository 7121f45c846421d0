"""Convolutional KL autoencoder of latent diffusion (arXiv 2112.10752), from SD 1 to FLUX.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Posterior, Tokenizer
from components.files.adapter import load_module
from components.nn.group_norm import GroupNorm, GroupNormSiLU
from components.nn.precision import at_least_fp32, computed_on_cpu
from components.registry import File, tokenizers
from plugins.tokenizers.autoencoder_kl.diffusers_format import Diffusers

# (latent channels, multipliers, levels with attention, quant_conv, patch)
PRESETS = {
    "f8d4": (4, (1, 2, 4, 4), (), True, 1),
    "f8d16": (16, (1, 2, 4, 4), (), False, 1),
    "f16d32": (32, (1, 1, 2, 2, 4), (4,), True, 1),
    "f16d128": (32, (1, 2, 4, 4), (), True, 2),
}


@tokenizers.register("autoencoder_kl")
class AutoencoderKL(Tokenizer):
    """Convolutional VAE: SD 1, 2, XL (f8d4), SD3, FLUX (f8d16), VA-VAE (f16d32), FLUX.2 (f16d128), or a custom one.

    State-dict keys are those of the CompVis and REPA-E checkpoints.

    Args:
        preset: published architecture: f8d4 (SD 1.x, 2.x and XL), f8d16 (SD3, SD3.5 and FLUX), f16d32 (IN-VAE and
            VA-VAE) or f16d128 (FLUX.2); the options below override it.
        latent_channels: channels of the network's latents; with ``patch`` the latents have patch ** 2 times as many.
        channels: channels at full resolution; a multiple of ``norm_groups``.
        multipliers: channels per level, as multiples of ``channels``; the downsampling factor is 2 ** (levels - 1).
        attention_levels: levels with attention after each residual block; level 0 is full resolution.
        res_blocks: residual blocks per encoder level; decoder levels have one more.
        mid_attention: attention between the two innermost residual blocks.
        norm_groups: groups of every group norm.
        quant_conv: 1 x 1 convolutions before and after the latent; none: the preset's (false for f8d16, else true).
        patch: each patch x patch square of the network's latents is one latent position, as in FLUX.2; none: the
            preset's (2 for f16d128, else 1).
        checkpoint: initial weights: a CompVis, SD, REPA-E, diffusers or titanrepa file, a diffusers folder, or
            hf://organization/name/file[@revision]; none: random weights.
        trainable: false freezes the tokenizer; recipes that train it then raise an error.

    Raises:
        ValueError: channels are not divisible by the group-norm groups, or an attention level does not exist.
    """

    adapters = (Diffusers,)

    def __init__(
        self,
        *,
        preset: Literal["f8d4", "f16d32", "f8d16", "f16d128"] = "f8d4",
        latent_channels: int | None = None,
        channels: int = 128,
        multipliers: list[int] | None = None,
        attention_levels: list[int] | None = None,
        res_blocks: int = 2,
        mid_attention: bool = True,
        norm_groups: int = 32,
        quant_conv: bool | None = None,
        patch: int | None = None,
        checkpoint: File | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        preset_channels, preset_multipliers, preset_attention, preset_quant_conv, preset_patch = PRESETS[preset]
        quant_conv = preset_quant_conv if quant_conv is None else quant_conv
        self.patch = preset_patch if patch is None else patch
        multipliers = list(preset_multipliers) if multipliers is None else multipliers
        if attention_levels is None:
            # The preset's levels apply only to the preset's multipliers.
            attention_levels = list(preset_attention) if multipliers == list(preset_multipliers) else []
        inner = preset_channels if latent_channels is None else latent_channels
        if inner < 1:
            raise ValueError(f"tokenizer.latent_channels = {latent_channels}: expected at least 1")
        if self.patch < 1:
            raise ValueError(f"tokenizer.patch = {patch}: expected at least 1")
        self.channels = inner * self.patch**2
        self.factor = 2 ** (len(multipliers) - 1) * self.patch
        self.checkpoint = checkpoint
        self.trainable = trainable
        _check(channels, multipliers, attention_levels, res_blocks, norm_groups)
        # All sizes that determine the weights, for formats that store the architecture.
        self.architecture = {
            "latent_channels": inner,
            "channels": channels,
            "multipliers": list(multipliers),
            "attention_levels": sorted(set(attention_levels)),
            "res_blocks": res_blocks,
            "mid_attention": mid_attention,
            "norm_groups": norm_groups,
            "quant_conv": quant_conv,
            "patch": self.patch,
        }
        widths = [channels * m for m in multipliers]
        self.encoder = Encoder(widths, attention_levels, res_blocks, mid_attention, norm_groups, 2 * inner)
        self.decoder = Decoder(widths, attention_levels, res_blocks + 1, mid_attention, norm_groups, inner)
        self.quant_conv = nn.Conv2d(2 * inner, 2 * inner, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(inner, inner, 1) if quant_conv else nn.Identity()

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> posterior over (B, C, R / factor, R / factor); log-variance in [-30, 20]."""
        # fp32, because the KL divergence sums thousands of terms.
        mean, logvar = at_least_fp32(self.quant_conv(self.encoder(x))).chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        if self.patch > 1:
            mean, logvar = (F.pixel_unshuffle(value, self.patch) for value in (mean, logvar))
        return Posterior(mean, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h * factor, w * factor), nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(F.pixel_shuffle(z, self.patch) if self.patch > 1 else z))

    def last_layer(self) -> nn.Module:
        """Return the decoder's last convolution."""
        return self.decoder.conv_out

    def load_weights(self) -> None:
        """Load ``checkpoint``, if set; every key must match.

        Raises:
            WeightsError: the file is missing, unreadable, or does not fit the architecture.
        """
        if self.checkpoint:
            load_module(self, self.checkpoint, "tokenizer", "[tokenizer] autoencoder_kl")

    def init_weights(self) -> None:
        """Initialize with PyTorch's defaults, as in the CompVis code."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
                module.reset_parameters()

    def units(self) -> Sequence[nn.Module]:
        """Return the stages in the order in which they run."""
        return [*self.encoder.down, self.encoder.mid, self.decoder.mid, *reversed(self.decoder.up)]

    def compiled_methods(self) -> Sequence[Any]:
        """Return the output layers of encoder and decoder."""
        return [self.encoder.head, self.decoder.head]


class Encoder(nn.Module):
    """Image (B, 3, R, R) -> mean and log-variance, concatenated (B, out_channels, h, w)."""

    def __init__(
        self,
        widths: list[int],
        attention_levels: Sequence[int],
        res_blocks: int,
        mid_attention: bool,
        norm_groups: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, (width_in, width) in enumerate(zip([widths[0], *widths], widths)):
            last = level == len(widths) - 1
            attention = level in attention_levels
            self.down.append(Stage(width_in, width, res_blocks, attention, norm_groups, None if last else Downsample))
        self.mid = Middle(widths[-1], mid_attention, norm_groups)
        self.norm_out = norm_silu(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        return self.head(self.mid(x))

    def head(self, x: Tensor) -> Tensor:
        return self.conv_out(self.norm_out(x))


class Decoder(nn.Module):
    """Latent -> image. ``up`` is indexed by level (0 is full resolution) and runs in reverse order."""

    def __init__(
        self,
        widths: list[int],
        attention_levels: Sequence[int],
        res_blocks: int,
        mid_attention: bool,
        norm_groups: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], mid_attention, norm_groups)
        self.up = nn.ModuleList()
        for level, (width, width_in) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            attention = level in attention_levels
            resample = None if level == 0 else Upsample
            self.up.append(Stage(width_in, width, res_blocks, attention, norm_groups, resample))
        self.norm_out = norm_silu(widths[0], norm_groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            x = stage(x)
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        return self.conv_out(self.norm_out(x))


class Stage(nn.Module):
    """One level: residual blocks, each optionally followed by attention, then optional down- or upsampling."""

    def __init__(
        self,
        width_in: int,
        width: int,
        blocks: int,
        attention: bool,
        norm_groups: int,
        resample: type[nn.Module] | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width_in if i == 0 else width, width, norm_groups) for i in range(blocks)
        )
        self.attn = nn.ModuleList(SpatialAttention(width, norm_groups) for _ in range(blocks if attention else 0))
        self.resample = "downsample" if resample is Downsample else "upsample"
        if resample is not None:
            self.add_module(self.resample, resample(width))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        resample = self._modules.get(self.resample)
        return x if resample is None else resample(x)


class Middle(nn.Module):
    def __init__(self, width: int, attention: bool, norm_groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, norm_groups)
        self.attn_1 = SpatialAttention(width, norm_groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(width, width, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice; the shortcut has a 1 x 1 convolution if the width changes."""

    def __init__(self, width_in: int, width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = norm_silu(width_in, norm_groups)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = norm_silu(width, norm_groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        shortcut = self._modules.get("nin_shortcut")
        return h + (x if shortcut is None else shortcut(x))


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map.

    Heads of 512 features are too wide for the fast attention kernels of a GPU, whose backward pass is slow then. With
    gradients, in bf16, products are faster there, and are what the published code computes; their memory is quadratic
    in the positions.

    Attributes:
        fast: whether to do so, for at most ``MAX_POSITIONS``.
    """

    fast = True
    MAX_POSITIONS = 4096

    def __init__(self, width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(width, norm_groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # (B, 1 head, positions, width)
        q, k, v = (f(normed).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        low = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
        explicit = self.fast and low and q.requires_grad and q.shape[2] <= self.MAX_POSITIONS
        h = explicit_attention(q, k, v) if explicit else F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(width)) v for (B, heads, positions, width), with a softmax in at least fp32."""
    logits = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.mT)
    return logits.softmax(-1).to(v.dtype) @ v


class Downsample(nn.Module):
    """Strided convolution, padded only on the right and bottom as in released weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def doubled(x: Tensor) -> Tensor:
    """Nearest-neighbor upsampling by 2, whose backward pass is a sum; the compiler's of interpolate uses atomics."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # in channels-last layout, as the convolution wants it
    return x.expand(b, h, 2, w, 2, c).reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2 and a 3 x 3 convolution.

    In fp32 training on a CPU both are one transposed convolution, with 4 products per output instead of 9: equal
    neighbors are multiplied once, by the sum of their weights. Equal up to rounding, and 1.1 to 1.6 times as fast
    forward and backward; in bf16, or forward only with many channels, it is slower. Compiled for a GPU, upsampling
    is a copy whose backward pass is a sum.

    Attributes:
        merges: whether to do so.
    """

    merges = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        in_fp32 = x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu")
        if self.merges and in_fp32 and computed_on_cpu(x) and torch.is_grad_enabled():
            weight = self.conv.weight.transpose(0, 1).flip(2, 3)
            merged = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # sums of 2 x 2: now 4 x 4
            return F.conv_transpose2d(x, merged, self.conv.bias, stride=2, padding=1)
        if self.merges and torch.compiler.is_compiling() and x.device.type == "cuda":
            x = doubled(x)
        else:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


def group_norm(width: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, width, eps=1e-6)


def norm_silu(width: int, groups: int) -> GroupNormSiLU:
    return GroupNormSiLU(groups, width, eps=1e-6)


def _check(
    channels: int,
    multipliers: Sequence[int],
    attention_levels: Sequence[int],
    res_blocks: int,
    norm_groups: int,
) -> None:
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"tokenizer.multipliers = {list(multipliers)}: expected one positive integer per level")
    if norm_groups < 1 or channels < 1 or any(channels * m % norm_groups for m in multipliers):
        raise ValueError(
            f"tokenizer.channels = {channels}: every level's channels ({[channels * m for m in multipliers]}) "
            f"must be a multiple of tokenizer.norm_groups = {norm_groups}"
        )
    wrong = [level for level in attention_levels if not 0 <= level < len(multipliers)]
    if wrong:
        raise ValueError(
            f"tokenizer.attention_levels = {list(attention_levels)}: level {wrong[0]} does not exist; "
            f"allowed: 0 to {len(multipliers) - 1}"
        )
    if res_blocks < 1:
        raise ValueError(f"tokenizer.res_blocks = {res_blocks}: expected at least 1")
