"""Encoder of masked autoencoders (MAE; He et al. 2021, arXiv 2111.06377)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

MODELS = {"b": "vit_base_patch16_224.mae", "l": "vit_large_patch16_224.mae", "h": "vit_huge_patch14_224.mae"}
DECODER = ("decoder_", "mask_token")


@encoders.register("mae")
class MAE(TimmEncoder):
    """MAE ViT patch tokens of the last block, without the final norm (D = 768, 1024 or 1280).

    Follows REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), which use ViT-L:

    - tokens: patch tokens of the last block, without masking and, as in REPA's code, without the final norm; the class
      token is dropped;
    - images: scaled to [0, 1], normalized with ImageNet's mean and std, resized (bicubic) to one patch per token; for
      256-pixel images and 16 x 16 tokens, B and L take 256 pixels and H/14 takes 224;
    - position embedding: sine-cosine, stored in the file for a 14 x 14 grid (H: 16 x 16), resampled to the denoiser's;
    - image embedding: the class token after the final norm, as in MAE's linear probes.

    Args:
        size: ViT-B/16, L/16 or H/14.
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's or the authors' layout ("model"); decoder weights, if any,
            are ignored.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b", "l", "h"] = "l",
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        super().__init__(MODELS[size], grid, pretrained=pretrained, checkpoint=checkpoint, final_norm=False)

    def _read(self, path: str | Path) -> dict[str, Tensor]:
        return {key: value for key, value in super()._read(path).items() if not key.startswith(DECODER)}
