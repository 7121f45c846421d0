"""Autoencoder of Qwen-Image (arXiv 2508.02324), a causal video autoencoder used on single images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Posterior, Tokenizer
from components.files.adapter import load_module
from components.nn.precision import at_least_fp32
from components.registry import File, tokenizers
from plugins.tokenizers.qwen_image.diffusers_format import Diffusers


@tokenizers.register("qwen_image_vae")
class QwenImageVAE(Tokenizer):
    """VAE of Qwen-Image (f8d16), for images: diffusers' ``AutoencoderKLQwenImage`` on one frame.

    For the first frame of a causal network, all earlier frames are zeros, and layers that change the frame rate have no
    effect. A 3-D convolution is then the 2-D convolution with the kernel's last slice, which is what this plugin has.
    Its keys are those of diffusers.

    Args:
        latent_channels: latent channels C.
        channels: channels at full resolution.
        multipliers: channels per level, as multiples of ``channels``; the downsampling factor is 2 ** (levels - 1).
        res_blocks: residual blocks per encoder level; decoder levels have one more.
        checkpoint: initial weights: a diffusers folder of ``AutoencoderKLQwenImage``, a file with its keys, a titanrepa
            file, or hf://organization/name/file[@revision]; none: random weights.
        trainable: false freezes the tokenizer; recipes that train it then raise an error.

    Raises:
        ValueError: an option is out of range.
    """

    adapters = (Diffusers,)

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        channels: int = 96,
        multipliers: list[int] | None = None,
        res_blocks: int = 2,
        checkpoint: File | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        multipliers = [1, 2, 4, 4] if multipliers is None else list(multipliers)
        for name, value in (("latent_channels", latent_channels), ("channels", channels), ("res_blocks", res_blocks)):
            if value < 1:
                raise ValueError(f"tokenizer.{name} = {value}: expected at least 1")
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"tokenizer.multipliers = {multipliers}: expected one positive integer per level")
        if odd := [m for m in multipliers[1:] if channels * m % 2]:
            raise ValueError(
                f"tokenizer.channels = {channels} with multiplier {odd[0]}: the decoder halves the channels of each "
                "level but the first; expected an even product"
            )
        self.channels = latent_channels
        self.factor = 2 ** (len(multipliers) - 1)
        self.checkpoint = checkpoint
        self.trainable = trainable
        self.architecture = {
            "latent_channels": latent_channels,
            "channels": channels,
            "multipliers": multipliers,
            "res_blocks": res_blocks,
        }
        widths = [channels * m for m in multipliers]
        self.encoder = Encoder(channels, widths, res_blocks, 2 * latent_channels)
        self.decoder = Decoder(widths, channels, res_blocks + 1, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> posterior over (B, C, R / factor, R / factor); log-variance in [-30, 20]."""
        # fp32, because the KL divergence sums thousands of terms.
        mean, logvar = at_least_fp32(self.quant_conv(self.encoder(x))).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h * factor, w * factor), nominally in [-1, 1]; diffusers clamps to that."""
        return self.decoder(self.post_quant_conv(z))

    def last_layer(self) -> nn.Module:
        """Return the decoder's last convolution."""
        return self.decoder.conv_out

    def load_weights(self) -> None:
        """Load ``checkpoint``, if set; every key must match.

        Raises:
            WeightsError: the file is missing, unreadable, or does not fit the architecture.
        """
        if self.checkpoint:
            load_module(self, self.checkpoint, "tokenizer", "[tokenizer] qwen_image_vae")

    def init_weights(self) -> None:
        """Initialize with PyTorch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.gamma)

    def units(self) -> Sequence[nn.Module]:
        """Return blocks in the order in which they run."""
        return [*self.encoder.down_blocks, self.encoder.mid_block, self.decoder.mid_block, *self.decoder.up_blocks]


class Encoder(nn.Module):
    """Image (B, 3, R, R) -> mean and log-variance, concatenated (B, out_channels, h, w)."""

    def __init__(self, channels: int, widths: list[int], res_blocks: int, out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down_blocks = nn.ModuleList()  # flat: the blocks of a level, then its downsampling
        for level, (width_in, width) in enumerate(zip([channels, *widths], widths)):
            self.down_blocks.extend(ResidualBlock(width if i else width_in, width) for i in range(res_blocks))
            if level < len(widths) - 1:
                self.down_blocks.append(Downsample(width))
        self.mid_block = Middle(widths[-1])
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent -> image. ``up_blocks`` begin at the innermost level; upsampling halves the channels."""

    def __init__(self, widths: list[int], channels: int, blocks: int, in_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid_block = Middle(widths[-1])
        self.up_blocks = nn.ModuleList()
        width_in = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            self.up_blocks.append(UpBlock(width_in, width, blocks, upsample=level > 0))
            width_in = width // 2
        self.norm_out = RMSNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class UpBlock(nn.Module):
    """Residual blocks, then upsampling to half as many channels."""

    def __init__(self, width_in: int, width: int, blocks: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width if i else width_in, width) for i in range(blocks))
        self.upsamplers = nn.ModuleList([Upsample(width)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width)])
        self.resnets = nn.ModuleList([ResidualBlock(width, width), ResidualBlock(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice; the shortcut has a 1 x 1 convolution if the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = RMSNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.conv_shortcut(x)


class Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # (B, 1 head, positions, width)
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Strided convolution, padded only on the right and bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling and a convolution to half as many channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width // 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of a feature map, in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(x), dim=1).to(x.dtype) * x.shape[1] ** 0.5 * self.gamma
