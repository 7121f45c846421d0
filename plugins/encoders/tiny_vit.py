"""Small vision transformer that ships with the repository: an alignment target that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components import registry
from components.contracts import Encoder
from components.files.weights import load_strict, read_state

WIDTH, DEPTH, HEADS, PATCH, GRID = 96, 3, 3, 4, 8  # GRID: tokens per side in training, on 32-pixel images
CLASSES = 10


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, WIDTH) -> (B, N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@registry.encoders.register("tiny_vit")
class TinyViT(Encoder):
    """Small ViT trained on dataset ``shapes``; its weights ship with the repository, so quick runs need no download.

    It has three blocks of width 96. It was trained with labels on split "train", on 32-pixel images with 8 x 8 tokens
    and, in a quarter of the steps, on 64-pixel images with 16 x 16 tokens. A linear head predicts for each token how
    much of its patch is background or a shape of each class, which makes tokens encode what is where; the head's mean
    over the tokens classifies the image, with 99.84 % accuracy on 5000 images of split "heldout"
    (``python -m plugins.datasets.train_shapes_nets accuracy``). The mean of the tokens is therefore its own embedding
    of an image, which takes the place of a class token.

    Args:
        checkpoint: file with other weights for this network; none: the shipped weights.
    """

    embed_dim = WIDTH
    own_embedding = True
    native_grid = GRID
    depth = DEPTH

    def __init__(self, resolution: int, grid: int, *, checkpoint: registry.File | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.checkpoint = checkpoint
        # Two strided convolutions reach 93 % accuracy after 300 steps; a single 4 x 4 one reaches 51 %.
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(32, WIDTH, 3, stride=2, padding=1)
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, WIDTH, GRID, GRID))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1 + CLASSES)  # background, then the classes
        self.requires_grad_(False).eval()

    def load_weights(self) -> None:
        """Load the shipped weights, or those of ``checkpoint``.

        Raises:
            WeightsError: the file is missing or unreadable, or does not fit this network.
        """
        source = self.checkpoint or Path(__file__).with_suffix(".safetensors")
        load_strict(self, read_state(source, "encoder tiny_vit"), "encoder tiny_vit", source)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, grid * grid, 96) patch tokens in row-major order.

        A grid finer than 8 x 8 takes a larger image and a resampled position embedding. A coarser grid averages the
        8 x 8 tokens, because shapes cannot be recognized in images below 32 pixels.
        """
        return self._on_grid(self.features(images))

    def block_tokens(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Tokens of several blocks: see :meth:`components.contracts.Encoder.block_tokens`."""
        found = self._blocks(images)
        return [self._on_grid(found[index]) for index in blocks]

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, n * n, 96) tokens with n = max(grid, 8); differentiable."""
        return self.norm(self._blocks(images)[-1])

    def _blocks(self, images: Tensor) -> list[Tensor]:
        n = max(self.grid, GRID)
        images = _resize(images, PATCH * n)
        x = self.patch_embed(images) + _resize(self.pos_embed, n)
        x = x.flatten(2).transpose(1, 2)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def _on_grid(self, tokens: Tensor) -> Tensor:
        if self.grid < GRID:
            planes = tokens.transpose(1, 2).unflatten(2, (GRID, GRID))
            tokens = F.adaptive_avg_pool2d(planes, self.grid).flatten(2).transpose(1, 2)
        return tokens

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, 10) logits over the classes of ``shapes``."""
        return self.head(self.features(images)).mean(1)[:, 1:]


def _resize(planes: Tensor, side: int) -> Tensor:
    """(B, C, s, s) -> (B, C, side, side)."""
    if planes.shape[-1] == side:
        return planes
    return F.interpolate(planes, (side, side), mode="bilinear", antialias=True)
