"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), with or without registers (Darcet et al. 2023, arXiv 2309.16588)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

ARCHITECTURES = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant"}


@encoders.register("dinov2")
class DINOv2(TimmEncoder):
    """DINOv2 ViT/14 patch tokens after the final norm: the alignment target of the published REPA-E runs.

    Follows REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483):

    - tokens: patch tokens of the last block after the final LayerNorm (``x_norm_patchtokens`` in the authors' code),
      which DINOv2's dense tasks also use; class and register tokens are dropped;
    - images: scaled to [0, 1], normalized with ImageNet's mean and std, resized (bicubic) to 14 pixels per token
      (256 -> 224 for 16 x 16 tokens, 512 -> 448 for 32 x 32);
    - position embedding: trained at 518 pixels on a 37 x 37 grid, resampled to the denoiser's grid.

    D is 384, 768, 1024 or 1536 for sizes s, b, l and g.

    Args:
        size: ViT-S, B, L or g.
        registers: use the variant with four register tokens.
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's or the authors' layout.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["s", "b", "l", "g"] = "b",
        registers: bool = False,
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        variant = "_reg4" if registers else ""
        super().__init__(
            f"{ARCHITECTURES[size]}_patch14{variant}_dinov2.lvd142m",
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
        )
